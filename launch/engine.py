"""The network behind the engine that a configuration asks for, on ranks that have met."""

import torch

from launch import runtime
from launch.config import RunConfig
from launch.network import build_network
from launch.resolve import resolve
from model.initialization import rms_floors
from model.parallel.mesh import Mesh, make_mesh
from trainer.engines.base import NO_HOOKS, Engine, StepHooks
from trainer.engines.fold import Fold
from trainer.engines.fold_pipeline import FoldPipeline
from trainer.engines.zero import Zero
from trainer.engines.zero_pipeline import ZeroPipeline


def join_ranks(config: RunConfig, world: runtime.World, device: torch.device) -> Mesh:
    """Meet the other ranks and form the process groups, all of them with parallel.timeout_seconds."""
    runtime.join_process_group(device, world, config.parallel.timeout_seconds)
    parallel = config.parallel
    return make_mesh(
        parallel.tensor_parallel_size, device, parallel.timeout_seconds,
        parallel.context_parallel_size, parallel.pipeline_parallel_size, parallel.expert_parallel_size,
    )  # fmt: skip


def make_engine(config: RunConfig, mesh: Mesh) -> Engine:
    """The engine for a configuration whose automatic choices are still to be made."""
    return build_engine(resolve(config, mesh.world.size, mesh.device), mesh)


def build_engine(acting: RunConfig, mesh: Mesh, hooks: StepHooks = NO_HOOKS) -> Engine:
    """The engine for a configuration whose automatic choices are made (launch/resolve.py)."""
    model = build_network(acting, mesh, acting.train.recompute)
    floors, optimizer = rms_floors(model), acting.optimizer.in_precision(acting.train.precision)
    match acting.parallel.engine:
        case "zero":
            engine = Zero if mesh.pipeline.size == 1 else ZeroPipeline
            return engine(model, acting.parallel, optimizer, acting.train, mesh, floors, hooks)
        case "fold":
            options = {"seed": acting.run.seed, "rms_floor": floors, "hooks": hooks}
            options |= {"bucket_numbers": acting.parallel.reduce_bucket_elements}
            if mesh.pipeline.size == 1:
                return Fold(model, optimizer, mesh, **options)
            return FoldPipeline(model, optimizer, mesh, schedule=acting.parallel.pipeline_schedule, **options)
        case _:
            raise ValueError(f"parallel.engine = '{acting.parallel.engine}'; legal: zero, fold")
