"""A window of steps becomes a Chrome trace with the work of these steps and no other."""

import json
from pathlib import Path

import pytest
import torch
from torch.profiler import record_function

from trainer.config import ProfileConfig
from trainer.monitoring.profile import Profile

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:torch.*")


def _run(directory: Path, settings: ProfileConfig, first: int, end: int) -> dict[str, set[str]]:
    with Profile(settings, directory, rank=0) as profile:
        for step in range(first, end):
            profile.before(step)
            with record_function(f"step {step}"):
                torch.ones(8, 8) @ torch.ones(8, 8)
    traces = sorted((directory / "profile").glob("*.json")) if (directory / "profile").exists() else []
    return {path.name: _steps(path) for path in traces}


def _steps(path: Path) -> set[str]:
    names = {event.get("name", "") for event in json.loads(path.read_text())["traceEvents"]}
    assert "aten::mm" in names
    return {name for name in names if name.startswith("step ")}


def test_only_the_window_is_traced(tmp_path: Path):
    traces = _run(tmp_path, ProfileConfig(start_step=2, steps=2), 0, 6)
    assert traces == {"steps-2-3-rank-0.json": {"step 2", "step 3"}}


def test_a_run_that_ends_or_resumes_inside_the_window_traces_its_part(tmp_path: Path):
    settings = ProfileConfig(start_step=2, steps=4)
    assert _run(tmp_path, settings, 0, 4) == {"steps-2-3-rank-0.json": {"step 2", "step 3"}}
    assert _run(tmp_path, settings, 4, 8)["steps-4-5-rank-0.json"] == {"step 4", "step 5"}


def test_off_by_default(tmp_path: Path):
    assert _run(tmp_path, ProfileConfig(), 0, 3) == {}
