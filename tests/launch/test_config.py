import pytest

from launch.load_config import build_config


def test_defaults_hold_together():
    config = build_config({})
    assert config.model.kv_heads == 4 and config.optimizer.name == "tiger"


def test_what_was_learned_of_positions_stays_when_they_are_read_with_another_map():
    learned = ["position.rope_theta=500", "position.log_n=trained", "position.trained_length=64"]
    read = build_config({}, [*learned, "evaluate.position={kind='rerope',window=24}"]).evaluate.position
    assert read is not None
    assert (read.kind, read.window, read.rope_theta, read.log_n, read.trained_length) == ("rerope", 24, 500, "trained", 64)
    read = build_config({}, [*learned, "evaluate.position={kind='rope',rope_theta=1e6,log_n='none'}"]).evaluate.position
    assert read is not None and (read.rope_theta, read.log_n, read.trained_length) == (1e6, "none", 64)


def test_home_is_ours_to_fill_in(monkeypatch: pytest.MonkeyPatch):
    """bash hands run.dir=~/x on as it is, and a folder of the name ~ was made."""
    monkeypatch.setenv("HOME", "/home/me")
    config = build_config({}, ["run.dir=~/runs/a", "checkpoint.directory=~/c", "checkpoint.resume=~/runs/b"])
    assert (config.run.dir, config.checkpoint.directory, config.checkpoint.resume) == (
        "/home/me/runs/a", "/home/me/c", "/home/me/runs/b",
    )  # fmt: skip
    assert build_config({}, ["checkpoint.directory=s3://a/~b"]).checkpoint.directory == "s3://a/~b"
