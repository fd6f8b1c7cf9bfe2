"""Commands tell the present names of keys."""

from pathlib import Path

import pytest

from launch.commands.configured import load_told


def test_an_earlier_name_is_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "old.toml"
    path.write_text("[optimizer]\nlearning_rate = 2e-3\n")
    assert load_told(path, None).optimizer.rate == 2e-3
    assert capsys.readouterr().err == "tiglon: optimizer.learning_rate is now optimizer.tiger.learning_rate\n"
    assert load_told(path, ["optimizer.name=lion"]).optimizer.lion.learning_rate == 2e-3
