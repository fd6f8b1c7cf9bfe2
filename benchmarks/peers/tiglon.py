"""tiglon under test: the engine, network and update of `tiglon train`, without the files of a run."""

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.peers.worker import Orders, serve, step_for_ever
from launch import runtime
from launch.config import build
from launch.train import make_engine
from model.parallel import make_topology


@dataclass(frozen=True)
class Batch:
    """As data.stream.Batch."""

    inputs_BS: Tensor
    targets_BS: Tensor
    cu_seqlens: Tensor | None = None


def train(orders: Orders) -> None:
    """Options: compile, cuda_graphs, engine, zero_stage, optimizer, recompute, tensor_parallel_size."""
    job, here = orders.job, runtime.world()
    device = runtime.choose_device(job.device, here)
    runtime.prepare_process(device, here)
    runtime.join(device, here, timeout_seconds=600)
    size = job.options.get("tensor_parallel_size", 1)
    engine_name = job.options.get("engine", "zero")
    config = build({
        "run": {"device": job.device},
        "model": job.model,
        "optimizer": {"name": job.options.get("optimizer", "adamw"), "learning_rate": job.learning_rate},
        "train": {
            "sequence_length": job.length,
            "micro_batch_size": job.batch,
            "global_batch_size": job.batch * here.world_size // size,
            "precision": "bf16",
            "compile": job.compiled,
            "cuda_graphs": bool(job.options.get("cuda_graphs")),
            "recompute": job.options.get("recompute", "none"),
        },
        "parallel": {
            "engine": engine_name, "zero_stage": job.options.get("zero_stage", 1), "tensor_parallel_size": size,
        },
    })  # fmt: skip
    engine = make_engine(config, make_topology(size, device), here.world_size)

    def step(inputs: Tensor, targets: Tensor) -> Tensor:
        loss = engine.accumulate([Batch(inputs, targets)])
        engine.update(config.optimizer.rate)
        engine.clock.start()
        return loss

    step_for_ever(orders, step)


if __name__ == "__main__":
    torch.manual_seed(0)
    serve(train)
