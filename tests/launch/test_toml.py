from pathlib import Path

from launch.load_config import build_config, load_config
from launch.toml import dump


def test_dump_reads_back_to_the_same(tmp_path: Path):
    values = {
        "data": {
            "train": [{"path": "a\\b", "weight": 0.1}, {"path": 'c"d'}],
            "curriculum": [{"from_step": 3, "sources": [{"path": "x"}]}],
        },
        "schedule": {"kind": "piecewise", "points": [(10, 1.0), (20, 0.5)]},
        "evaluate": {"position": {"kind": "rerope", "window": 8}},
        "optimizer": {"tiger": {"learning_rate": 1.1e-3}, "rules": {"*.o_proj.*": {"rule": "lion", "betas": [0.5, 0.6]}}},
    }  # fmt: skip
    path = tmp_path / "run.toml"
    config = build_config(values)
    path.write_text(dump(config))
    assert load_config(path) == config
