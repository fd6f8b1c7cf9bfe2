"""A run that is killed inside its saves ends as if nothing had happened; 50 times is `python -m benchmarks.crash`."""

from pathlib import Path

import pytest

from tests.launch.crash import assert_same, disturb, finish, make_run


@pytest.mark.timeout(300)
def test_a_killed_run_ends_with_the_bits_of_an_undisturbed_one(tmp_path: Path) -> None:
    configuration = make_run(tmp_path, steps=120)
    finish(configuration, f"run.dir={tmp_path}/whole")
    outcome = disturb(configuration, tmp_path / "killed", kills=3, seed=2)
    assert len(outcome.deaths) == 3 and outcome.deaths[-1][3] < 120, outcome.deaths
    assert_same(tmp_path / "whole", tmp_path / "killed")
