from pathlib import Path

import pytest

from launch.load_config import load_config
from launch.shipped import SHIPPED


def test_file_then_overrides(tmp_path: Path):
    path = tmp_path / "run.toml"
    path.write_text('[train]\nsteps = 7\nprecision = "fp32"\n')
    config = load_config(path, ["train.steps=9", "run.dir=elsewhere", "optimizer.tiger.beta=0.9", "data.document_mask=true"])
    assert (config.train.steps, config.train.precision, config.run.dir) == (9, "fp32", "elsewhere")
    assert config.optimizer.tiger.beta == 0.9 and config.data.document_mask


def test_a_shipped_file_is_named_without_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert load_config("quickstart", ["train.steps=3"]) == load_config(SHIPPED / "quickstart.toml", ["train.steps=3"])
    monkeypatch.chdir(tmp_path)
    Path("quickstart").write_text("[train]\nsteps = 7\n")  # the user's own comes first
    assert load_config("quickstart").train.steps == 7


def test_missing_and_broken_files(tmp_path: Path):
    with pytest.raises(
        FileNotFoundError, match=r"does not exist; give .* a shipped one's name: continue-llama, deepseek-v2-lite, gpt-124m, "
    ):
        load_config(tmp_path / "no.toml")
    with pytest.raises(FileNotFoundError, match=r"is a directory; give the path of a TOML file"):
        load_config(tmp_path)
    with pytest.raises(ValueError, match=r"/proc/self/mem cannot be read \(.+\); give the path of a TOML file"):
        load_config("/proc/self/mem")
    (tmp_path / "bad.toml").write_text("[train\n")
    with pytest.raises(ValueError, match="is not valid TOML"):
        load_config(tmp_path / "bad.toml")
