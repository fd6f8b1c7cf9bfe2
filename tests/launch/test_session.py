"""What a session saves beside its tensors."""

from importlib.metadata import version
from pathlib import Path

from data.tokenizer.tokenizer import Tokenizer
from launch.checkpoints import read_meta
from launch.load_config import load_config
from tests.launch.test_train import run


def test_a_checkpoint_says_what_it_was_made_with(configuration: str, corpus: Path, tmp_path: Path):
    run(configuration, "train.steps=2", "parallel.tensor_parallel_size=2", "parallel.zero_stage=2", ranks=2)
    meta = read_meta(f"{tmp_path}/run/checkpoints/step-00000002")
    assert (meta.step, meta.tokens, meta.extra["batch"]) == (2, 2 * 8 * 32, 2)
    assert meta.fingerprints["tokenizer"] == Tokenizer.load(f"{corpus}/tokenizer").fingerprint
    alone = ("context", "data", "pipeline", "expert")
    sizes = {"tensor_parallel_size": 2, **{f"{axis}_parallel_size": 1 for axis in alone}}
    assert meta.world == {**sizes, "engine": "zero", "zero_stage": 2}
    assert meta.versions == {name: version(name) for name in ("tiglon", "torch", "deepspeed", "megatron-core")}
    assert meta.config["optimizer"]["adamw"]["learning_rate"] == load_config(configuration).optimizer.rate
