"""The [log] section."""

import tomllib
from pathlib import Path

import pytest
from pydantic import ValidationError

from trainer.monitoring.config import TRACKERS, LogConfig

PROJECT = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]


def test_trackers_are_chosen_by_their_packages_which_are_extras():
    for name, tracker in TRACKERS.items():
        assert LogConfig.model_validate({"tracker": name}).tracker == tracker.package == name
        assert any(requirement.startswith(name) for requirement in PROJECT["optional-dependencies"][name])
    assert len({tracker.run_file for tracker in TRACKERS.values()}) == len(TRACKERS)
    assert LogConfig().tracker == "none"


@pytest.mark.parametrize("wrong", [{"tracker": "wand"}, {"project": ""}, {"wandb": "cub"}])
def test_what_is_no_tracker_is_refused(wrong: dict):
    with pytest.raises(ValidationError):
        LogConfig.model_validate(wrong)
