"""parallel.timeout_seconds reaches every process group that a step's collectives go through."""

from copy import deepcopy
from typing import Any

import torch
import torch.distributed as dist

from launch import runtime
from launch.engine import join_ranks, make_engine
from launch.load_config import build_config
from tests.ranks import run_ranks

SECONDS = 431  # neither torch's default nor Megatron's, and no whole number of minutes
VALUES: dict[str, Any] = {
    "model": {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4},
    "train": {"sequence_length": 16, "global_batch_size": 4, "micro_batch_size": 1},
    "parallel": {"tensor_parallel_size": 2, "zero_stage": 3, "zero_hpz_partition_size": 2, "timeout_seconds": SECONDS},
}


def _groups(rank: int, world_size: int) -> dict[str, tuple[int, float]]:
    """Size and seconds of every group of this rank once its engine stands: Megatron's, ours and what DeepSpeed adds."""
    config, device = build_config(deepcopy(VALUES)), torch.device("cpu")
    engine = make_engine(config, join_ranks(config, runtime.world(), device))
    found = {
        str(name): (group.size(), group._get_backend(device).options._timeout.total_seconds())
        for name, group in ((group.group_name, group) for group in dist.distributed_c10d._world.pg_map)
    }
    engine.close()
    runtime.leave_process_group()
    return found


def test_every_group_has_the_runs_timeout():
    for found in run_ranks(_groups, 4, grouped=False):
        assert sorted(size for size, _ in found.values()).count(2) >= 3  # tensor, data, hpZ's
        assert {seconds for _, seconds in found.values()} == {SECONDS}
