"""What a rank of a pipeline holds at most while it is built, saved and loaded: its own stages, never the network.

Every rank is a process of its own; its peak is what the kernel says it has had in memory (VmHWM).
"""

import math
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from data.storage import open_store
from launch.checkpoints import load_checkpoint
from launch.config import RunConfig
from launch.engine import make_engine
from launch.load_config import build_config
from launch.network import build_network
from model.parallel.mesh import make_mesh
from model.sizes import parameter_specs
from tests.ranks import run_ranks
from trainer.checkpoint.api import Checkpoints
from trainer.checkpoint.manifest import CheckpointMeta
from trainer.config import CheckpointConfig

OTHERS = 32 << 20
"""Bytes of memory that a phase may take beside its tensors: code that runs for the first time, threads, buffers."""


def config(engine: str, schedule: Literal["1f1b", "interleaved"] = "1f1b") -> RunConfig:
    """A network of 8 blocks and about 240 MB, of which each of four ranks has two."""
    name, parallel = ("tiger", {"engine": "fold"}) if engine == "fold" else ("adamw", {"zero_stage": int(engine[-1])})
    return build_config({
        "model": {
            "vocab_size": 4096, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8,
        },
        "train": {"precision": "fp32", "sequence_length": 16, "global_batch_size": 4, "micro_batch_size": 1},
        "optimizer": {"name": name},
        "parallel": {**parallel, "pipeline_parallel_size": 4, "pipeline_schedule": schedule},
    })  # fmt: skip


def memory(name: str) -> int:
    """VmRSS, or its largest value VmHWM, of this process in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


class Peak:
    """`bytes`: how much more memory than at its beginning the process has had within the block."""

    def __enter__(self) -> "Peak":
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        self._before, self.bytes = memory("VmRSS"), 0
        return self

    def __exit__(self, *error: Any) -> None:
        self.bytes = memory("VmHWM") - self._before


def peaks(rank: int, world_size: int, folder: str, engine: str) -> dict[str, int]:
    """Of building the network and the engine, of saving, and of loading into ranks that have other layers; what is held."""
    settings, others = config(engine), config(engine, "interleaved")
    mesh = make_mesh(1, torch.device("cpu"), pipeline_parallel_size=4)
    with Peak() as network:
        model = build_network(settings, mesh)
    weights = sum(parameter.numel() * 4 for parameter in model.parameters())
    del model
    with Peak() as built:
        made = make_engine(settings, mesh)
    held, saved = made.training_state(), sum(shard.values.numel() * 4 for shard in made.shards())
    kept = Checkpoints(open_store, folder, CheckpointConfig(), torch.distributed.group.WORLD, lambda text: None)
    with Peak() as saving:
        kept.save(made.shards(), CheckpointMeta(1, 0, settings.model_dump(mode="json")))
        kept.wait()
    kept.close()
    made.close()
    made = make_engine(others, mesh)
    for shard in made.shards():
        shard.values.fill_(0)  # so that they are in memory
    with Peak() as loading:
        load_checkpoint(f"{folder}/step-00000001", made.shards())
        made.loaded(1)
    made.close()
    return {
        "network": network.bytes, "built": built.bytes, "saving": saving.bytes, "loading": loading.bytes,
        "weights": weights, "held": held.weights + held.others, "saved": saved,
    }  # fmt: skip


@pytest.mark.parametrize("engine", ["fold", pytest.param("zero1", marks=pytest.mark.slow)])
def test_a_rank_never_has_more_than_its_stages_and_one_tensor(tmp_path: Path, engine: str):
    """Weights are drawn whole, one at a time, and ZeRO sums gradients of all weights of a rank in float32."""
    sizes = [4 * math.prod(spec.shape) for spec in parameter_specs(config(engine).model).values()]
    for rank, found in enumerate(run_ranks(peaks, 4, str(tmp_path / "checkpoints"), engine)):
        weights = found["weights"]
        most = {
            "network": weights + max(sizes), "saving": found["saved"], "loading": max(sizes),
            "built": found["held"] + max(sizes) + (weights if engine == "zero1" else 0),
        }  # fmt: skip
        for phase, bytes_ in most.items():
            assert found[phase] < bytes_ + OTHERS, f"rank {rank}, {phase}: {found}"
        assert most["network"] + OTHERS < sum(sizes) / 2, "the test would not notice a rank that builds the whole network"
