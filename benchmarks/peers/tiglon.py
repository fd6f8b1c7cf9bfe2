"""tiglon under test: the engine, network and update of `tiglon train`, without the files of a run."""

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.peers.worker import Job, Orders, serve, step_for_ever
from launch import runtime
from launch.config import RunConfig
from launch.engine import make_engine
from launch.load_config import build_config
from model.parallel.mesh import make_mesh


@dataclass(frozen=True)
class Batch:
    """As data.corpus.stream.Batch."""

    inputs_BS: Tensor
    targets_BS: Tensor
    cu_seqlens: Tensor | None = None


def configured(job: Job, world_size: int) -> RunConfig:
    """A job as tiglon's configuration; options: compile, cuda_graphs, engine, zero_stage, optimizer, recompute,
    tensor_parallel_size, micro_batches (of an update and rank; default 1)."""
    size = job.options.get("tensor_parallel_size", 1)
    return build_config({
        "run": {"device": job.device},
        "model": job.model,
        "optimizer": {"name": (rule := job.options.get("optimizer", "adamw")), rule: {"learning_rate": job.learning_rate}},
        "train": {
            "sequence_length": job.length,
            "micro_batch_size": job.batch,
            "global_batch_size": job.batch * job.options.get("micro_batches", 1) * world_size // size,
            "precision": "bf16",
            "compile": job.compiled,
            "cuda_graphs": bool(job.options.get("cuda_graphs")),
            "recompute": job.options.get("recompute", "none"),
        },
        "parallel": {
            "engine": job.options.get("engine", "zero"),
            "zero_stage": job.options.get("zero_stage", 1), "tensor_parallel_size": size,
        },
    })  # fmt: skip


def started(device: str) -> torch.device:
    """The device of this process, made a rank of a run."""
    here = runtime.world()
    chosen = runtime.choose_device(device, here)
    runtime.prepare_process(chosen, here)
    runtime.join_process_group(chosen, here, timeout_seconds=600)
    return chosen


def train(orders: Orders) -> None:
    """Options: those of `configured`."""
    job, here = orders.job, runtime.world()
    device, config = started(job.device), configured(job, here.world_size)
    size = config.parallel.tensor_parallel_size
    engine = make_engine(config, make_mesh(size, device))

    def step(inputs: Tensor, targets: Tensor) -> Tensor:
        loss = engine.accumulate([Batch(inputs, targets)])
        engine.update(config.optimizer.rate)
        return loss

    step_for_ever(orders, step)


if __name__ == "__main__":
    torch.manual_seed(0)
    serve(train)
