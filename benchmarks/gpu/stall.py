"""How long training waits for an asynchronous checkpoint: products beside the copy out of the device and the writing."""

import math
import time
from typing import Any

import torch

from benchmarks.checkpoint import STATES, make_state
from benchmarks.gpu.figures import Part
from data.storage import open_store
from trainer.checkpoint.api import Checkpoints
from trainer.checkpoint.manifest import CheckpointMeta
from trainer.config import CheckpointConfig

ROUNDS = 3


def measure(part: Part) -> None:
    """A state of fold, weights and momentum in bfloat16."""
    part.attempt("stall", lambda: stalled(part))


def stalled(part: Part) -> dict[str, Any]:
    """Seconds in which the host waits, of a save with a step's work beside it, and of the same work alone."""
    sizes, dtype, kinds = STATES["1 billion, Tiger fold"]
    if part.tiny:
        sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    state = make_state(sizes, dtype, kinds)
    for shard in state:
        shard.values = shard.values.to(part.device)
    config = CheckpointConfig(asynchronous=True, keep=1, resume="never")
    kept = Checkpoints(open_store, str(part.scratch), config, None, print)
    size = 256 if part.tiny else 8192
    a = torch.randn(size, size, device=part.device).bfloat16()

    def work(times: int) -> float:
        begin = time.perf_counter()
        for _ in range(times):
            a @ a
        part.synchronize()
        return time.perf_counter() - begin

    work(2)
    times = math.ceil((0.05 if part.tiny else 0.25) / (work(10) / 10))  # the third of a step
    kept.reserve(state)
    alone, beside, stall, behind = [], [], [], []
    for number in range(ROUNDS + 1):
        alone.append(sum(work(times) for _ in range(3)))
        begin = time.perf_counter()
        kept.save(state, CheckpointMeta(number + 1, 0))
        waited, computed = time.perf_counter() - begin, work(times)
        once = time.perf_counter()
        kept.wait_for_copy("accumulate")
        waited, computed = waited + time.perf_counter() - once, computed + work(times) + work(times)
        once = time.perf_counter()
        kept.wait_for_copy("update")
        stall.append(waited + time.perf_counter() - once)
        beside.append(computed)
        kept.wait()
        behind.append(time.perf_counter() - begin)
    kept.close()
    middle = ROUNDS // 2
    return {
        "state_bytes": sum(shard.values.nbytes for shard in state), "first_stall_seconds": round(stall[0], 4),
        "stall_seconds": round(sorted(stall[1:])[middle], 4), "complete_after_seconds": round(sorted(behind[1:])[middle], 2),
        "work_beside_over_alone": round(sorted(beside[1:])[middle] / sorted(alone[1:])[middle], 3),
    }  # fmt: skip
