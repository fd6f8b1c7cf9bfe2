"""What a session saves beside its tensors, and that the engine and the session know of each other."""

from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data.tokenizer.tokenizer import Tokenizer
from launch.checkpoints import read_meta
from launch.config import load_config
from launch.session import _connect
from tests.launch.test_train import run
from trainer.engines.fold import Fold
from trainer.engines.zero import Zero


def test_a_checkpoint_says_what_it_was_made_with(configuration: str, corpus: Path, tmp_path: Path):
    run(configuration, "train.steps=2", "parallel.tensor_parallel_size=2", "parallel.zero_stage=2", ranks=2)
    meta = read_meta(f"{tmp_path}/run/checkpoints/step-00000002")
    assert (meta.step, meta.tokens, meta.extra["batch"]) == (2, 2 * 8 * 32, 2)
    assert meta.fingerprints["tokenizer"] == Tokenizer.load(f"{corpus}/tokenizer").fingerprint
    assert meta.world == {"tensor_parallel_size": 2, "data_parallel_size": 1, "engine": "zero", "zero_stage": 2}
    assert meta.versions == {name: version(name) for name in ("tiglon", "torch", "deepspeed", "megatron-core")}
    assert meta.config["optimizer"]["adamw"]["learning_rate"] == load_config(configuration).optimizer.rate


@pytest.mark.parametrize(("kind", "attribute"), [(Zero, "leave"), (Fold, "before_backward")])
def test_an_engine_asks_its_session_in_the_middle_of_a_step(kind: type, attribute: str):
    calls: list[tuple[str, dict]] = []
    engine = kind.__new__(kind)
    asked: Any = SimpleNamespace(
        stop_requested=lambda **options: calls.append(("stop", options)),
        wait_for_checkpoint_copy=lambda **options: calls.append(("release", options)),
    )
    _connect(engine, asked)
    getattr(engine, attribute)()
    assert calls == ([("stop", {"wait": False})] if kind is Zero else [("release", {"steady": False})])
