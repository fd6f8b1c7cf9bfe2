"""Training steps of Llama-shaped networks: tokens per second, MFU, memory, and where the time goes, beside the planner's."""

import gc
import statistics
import time
from typing import Any

import torch

from benchmarks.contestants import SHAPES
from benchmarks.gpu.figures import Part
from benchmarks.peers.tiglon import Batch, configured, started
from benchmarks.peers.worker import Job
from benchmarks.profile_step import profiled
from launch.config import RunConfig
from launch.engine import make_engine
from launch.planner.memory import layout_of, memory
from launch.planner.time import ACCELERATORS, Accelerator, predict
from launch.summary import peak_flops
from model.flops import flops_per_token
from model.parallel.mesh import make_mesh
from model.sizes import parameter_counts
from trainer.session import peak_memory_bytes

TINY = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip
ROUNDS = 3
BATCHES = 8
"""Different micro-batches, used in rotation."""
FOLD = {"engine": "fold", "optimizer": "tiger", "compile": True}


def measure_8b(part: Part) -> None:
    """Llama 3 8B at 4,096 tokens per sequence."""
    measure(part, "8b", 4096, 2, (1, 2, 4), FOLD)


def measure_1b(part: Part) -> None:
    """1B at 2,048 and at 4,096, under fold and under ZeRO 1 with AdamW."""
    measure(part, "1b", 2048, 8, (1, 4), FOLD)
    measure(part, "1b", 4096, 4, (1,), FOLD)
    measure(part, "1b", 2048, 8, (1,), {"compile": True})


def measure(part: Part, shape: str, length: int, batch: int, passes: tuple[int, ...], options: dict[str, Any]) -> None:
    """One network: as many figures as there are numbers of micro-batches per update, and a profile of the first."""
    length = 64 if part.tiny else length
    named = {"shape": shape, "length": length, "batch": batch, "engine": options.get("engine", "zero")}
    try:
        _measure(part, shape, length, batch, passes, options, named)
    except torch.OutOfMemoryError as error:
        part.say("step", **named, error=str(error).splitlines()[0][:300])
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        gc.collect()  # an engine and its network hold each other
        if part.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def _measure(
    part: Part, shape: str, length: int, batch: int, passes: tuple[int, ...], options: dict[str, Any], named: dict[str, Any]
) -> None:
    model = TINY if part.tiny else SHAPES[shape].model()
    begin = time.perf_counter()
    device = started(part.device.type)
    job = Job(model, length, batch, part.device.type, 3e-4, options)
    config = configured(job, 1)
    engine = make_engine(config, make_mesh(1, device))
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(config.model.vocab_size, (BATCHES, batch, length + 1), generator=generator).to(device)
    batches = [Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()) for rows in ids]
    part.synchronize()
    built, turn = time.perf_counter() - begin, 0

    def step(micro_batches: int) -> torch.Tensor:
        nonlocal turn
        loss = engine.accumulate([batches[(turn + index) % BATCHES] for index in range(micro_batches)])
        engine.update(config.optimizer.rate)
        turn += micro_batches
        assert loss is not None
        return loss

    begin = time.perf_counter()
    first = float(step(1))
    part.synchronize()
    waited = round(time.perf_counter() - begin, 1)
    part.say(
        "first step", **named, build_seconds=round(built, 1), first_step_seconds=waited, loss=first,
        parameters=parameter_counts(config.model)["total"],
    )  # fmt: skip
    for count in passes:
        speed(part, named, configured(_with(job, micro_batches=count), 1), lambda count=count: step(count), device)
    part.attempt("profile", lambda: profile(step, configured(job, 1), device), **named)
    engine.close()


def _with(job: Job, **options: Any) -> Job:
    return Job(job.model, job.length, job.batch, job.device, job.learning_rate, job.options | options)


def speed(part: Part, named: dict[str, Any], config: RunConfig, step: Any, device: torch.device) -> None:
    """Tokens per second of some rounds, with the host's own time, and the peak memory beside the planner's."""
    count = config.train.global_batch_size // config.train.micro_batch_size
    steps, rounds, host = (2 if part.tiny else max(3, 8 // count)), [], []
    for _ in range(2):
        step()
    part.synchronize()
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        for _ in range(steps):
            loss = step()
        host.append((time.perf_counter() - begin) / steps)
        part.synchronize()
        rounds.append((time.perf_counter() - begin) / steps)
    seconds, tokens = statistics.median(rounds), config.train.batch_tokens
    planned, peak = memory(config, layout_of(config, 1), device.type).peak, peak_flops(device, "bf16")
    mfu = tokens / seconds * flops_per_token(config.model, config.train.sequence_length, True) / peak
    part.say(
        "step", **named, micro_batches=count, tokens_per_second=round(tokens / seconds, 1), step_ms=round(1e3 * seconds, 2),
        host_ms=round(1e3 * statistics.median(host), 2), rounds=[round(tokens / each, 1) for each in rounds],
        mfu=round(mfu, 4),
        loss=float(loss), bytes=peak_memory_bytes(device), planned_bytes=planned,
    )  # fmt: skip


def profile(step: Any, config: RunConfig, device: torch.device) -> dict[str, Any]:
    """Milliseconds of a step by class of kernel, the most expensive kernels, and the planner's assumptions."""
    classes, dearest = profiled(lambda: step(1), 2, device)
    planned = predict(config, layout_of(config, 1), accelerator(device))
    parts = {"matrices": "matrix products", "attention": "attention", "pointwise": "pointwise", "optimizer": "update"}
    return {
        "ms": {kind: round(1e3 * value, 2) for kind, value in sorted(classes.items(), key=lambda item: -item[1])},
        "planned_ms": {name: round(1e3 * getattr(planned, part), 2) for part, name in parts.items()},
        "kernels": [(name[:150], kind, round(1e3 * value, 3), calls) for name, kind, value, calls in dearest[:40]],
    }


def accelerator(device: torch.device) -> Accelerator:
    """The planner's entry for this card; an unknown one counts as an H100."""
    if device.type == "cpu":
        return ACCELERATORS["cpu"]
    name = torch.cuda.get_device_name(device).lower().replace(" ", "")
    return next((known for known in ACCELERATORS.values() if known.name in name), ACCELERATORS["h100"])
