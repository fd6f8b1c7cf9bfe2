"""Defaults and automatic choices of a configuration, made once and written to RUN/config.toml."""

from typing import Any

import torch

from launch import runtime
from launch.acting_values import acting_values
from launch.batches import BEGINNING, ahead, micro_batches
from launch.config import RESOLVED, RunConfig
from launch.planner.layouts import choose_layout
from launch.resume import asked_for
from launch.toml import as_toml
from model.parallel.mesh import Mesh
from trainer.state import State


def resolve(config: RunConfig, world_size: int, device: torch.device, begun: State = BEGINNING) -> RunConfig:
    """The configuration with the choices that depend on ranks and memory made, for what follows a state of the run.

    Raises:
        ValueError: the ranks fit no layout.
    """
    world = runtime.world()
    capacity_bytes = runtime.memory_capacity_bytes(device, world)
    layout = choose_layout(ahead(config, begun), world_size, world.local_world_size, capacity_bytes, device.type)
    compiled = config.train.compile if config.optimizer.compile is None else config.optimizer.compile
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"device": device.type}),
            "train": config.train.model_copy(update={"recompute": layout.recompute}),
            "parallel": config.parallel.model_copy(update={"zero_hpz_partition_size": layout.zero_hpz_partition_size}),
            "optimizer": config.optimizer.model_copy(update={"compile": compiled}),
        }
    )


def config_toml(asked: RunConfig, acting: RunConfig, mesh: Mesh, begun: State = BEGINNING) -> str:
    """RUN/config.toml: what this start or an earlier one of the run asked for, and every value that acts below [resolved].

    The first part starts the same run again, in any directory.
    """
    acts, wanted = as_toml({RESOLVED: resolved(acting, mesh, begun)}), as_toml(asked_for(asked, acting))
    return f"{wanted}\n# Above: what was asked for. Below: every value that acts, which is not read back.\n\n{acts}"


def resolved(acting: RunConfig, mesh: Mesh, begun: State = BEGINNING) -> dict[str, Any]:
    """Every value that acts, by section; keys without a value are left out."""
    values = acting_values(acting)
    values["world"] = {
        "ranks": mesh.world.size,
        "context_parallel_size": mesh.context.size,
        "data_parallel_size": mesh.data.size,
        "pipeline_parallel_size": mesh.pipeline.size,
        "expert_parallel_size": mesh.experts.size,
        "micro_batches_per_update": micro_batches(ahead(acting, begun), mesh.world.size),
    }
    return _without_none(values)


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    kept = {key: _without_none(value) if isinstance(value, dict) else value for key, value in values.items()}
    return {key: value for key, value in kept.items() if value is not None}
