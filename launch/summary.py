"""The lines that a run shows when it starts, and the peak that MFU is measured against."""

import time
from itertools import pairwise

import torch

from data.storage import hide_login
from launch.batches import BEGINNING, ahead, batch_sizes, micro_batches, row_lengths, total_tokens
from launch.config import RunConfig
from launch.planner.time import ACCELERATORS
from model.attention.kernels.dispatch import AttentionProblem, describe
from model.flops import stage_bounds
from model.parallel.mesh import Mesh
from model.sizes import parameter_counts
from trainer.engines.base import Engine
from trainer.monitoring.progress import format_bytes, format_count, plural
from trainer.state import State


def start_summary(config: RunConfig, mesh: Mesh, engine: Engine, begun: State = BEGINNING) -> list[str]:
    """Model, layout, tokens per step, memory, goal: one line each, of a run that has reached `begun`."""
    model, train, parallel = config.model, config.train, config.parallel
    parts = parameter_counts(model)
    attention, _ = model.kinds
    return [
        f"model      {format_count(parts['total'])} parameters{_active(parts)}: "
        f"{plural(model.num_hidden_layers, 'layer')} of {model.hidden_size}, "
        f"{attention.describe(model)}, {_mixture(config)}"
        f"{config.position.kind}, {'tied' if model.tie_word_embeddings else 'untied'} head",
        *(f"attention  {line}" for line in _attention_backends(config, mesh.device.type)),
        f"layout     {mesh.world.size} x {mesh.device.type}: tensor {mesh.tensor.size}, {_context(config)}"
        f"data {mesh.data.size}, {_experts(config)}{_pipeline(config)}{engine.description}, {train.precision}",
        f"update     {format_count(train.batch_tokens)} tokens = {batch_sizes(train).words()} x {train.sequence_length:,}, "
        f"{plural(micro_batches(ahead(config, begun), mesh.world.size), 'micro-batch', 'micro-batches')} per rank, "
        f"{config.optimizer.name} at {config.optimizer.rate:g}",
        *([f"rows       {row_lengths(train).words()} tokens each"] if train.length_ramp else []),
        f"memory     {_memory(engine, parallel.offload == 'cpu')}",
        f"goal       {plural(train.steps, 'step')}, {format_count(total_tokens(train, begun))} tokens; {_directories(config)}",
    ]


def _active(parts: dict[str, int]) -> str:
    """How many parameters a token passes, where these are not all."""
    return f", {format_count(parts['active'])} active" if parts["active"] < parts["total"] else ""


def _mixture(config: RunConfig) -> str:
    """The experts, if there are any."""
    model, layers = config.model, len(config.model.layers_with_experts)
    if not layers:
        return ""
    shared = f" and {model.n_shared_experts} shared" if model.n_shared_experts else ""
    return f"{model.num_experts_per_tok} of {model.n_routed_experts} experts{shared} in {plural(layers, 'layer')}, "


def _context(config: RunConfig) -> str:
    """How sequences are shared, if they are."""
    size, exchange = config.parallel.context_parallel_size, config.parallel.context_exchange
    return f"context {size} ({exchange}), " if size > 1 else ""


def _experts(config: RunConfig) -> str:
    """How experts are split, if they are."""
    size, experts = config.parallel.expert_parallel_size, config.model.n_routed_experts
    return f"experts {size} ({experts // size} of {experts} each), " if size > 1 else ""


def _pipeline(config: RunConfig) -> str:
    """How layers are cut into stages, if they are."""
    parallel = config.parallel
    if parallel.pipeline_parallel_size == 1:
        return ""
    bounds = stage_bounds(config.model, config.train.sequence_length, parallel.pipeline_stages)
    layers = " + ".join(str(end - start) for start, end in pairwise(bounds))
    return f"pipeline {parallel.pipeline_parallel_size} ({parallel.pipeline_schedule}, {layers} layers), "


def _attention_backends(config: RunConfig, device: str) -> list[str]:
    """The backend of each kind of layer in training."""
    model, train, parallel = config.model, config.train, config.parallel
    problem = AttentionProblem(
        device, torch.bfloat16 if train.precision == "bf16" else torch.float32, model.head_size, model.value_size,
        train.sequence_length, packed=config.data.document_mask, compiled=train.compile,
        wants_lse=config.optimizer.qk_clip is not None,
        fewer_queries=parallel.context_parallel_size > 1 and parallel.context_exchange == "gather",
    )  # fmt: skip
    return describe(model, config.position, problem)


def _directories(config: RunConfig) -> str:
    """The directories of records, logs and checkpoints."""
    if not config.checkpoint.directory:
        return f"records, logs and checkpoints in {config.run.dir}"
    return f"records and logs in {config.run.dir}, checkpoints in {hide_login(config.checkpoint.directory)}"


def _memory(engine: Engine, offload: bool) -> str:
    """What this rank holds from step to step."""
    state = engine.training_state()
    weights, others = format_bytes(state.weights), f"{format_bytes(state.others)} of {state.what}"
    if offload:
        return f"{weights} of weights on this rank, {others} in host memory"
    return f"{weights} of weights and {others}: {format_bytes(state.weights + state.others)} of training state on this rank"


OTHER_BOARDS = ("pcie", "nvl")
"""Slower boards of the H100 and H200, which the table of launch/planner/time.py does not hold."""


def peak_flops(device: torch.device, precision: str) -> float:
    """Operations per second of one device in train.precision, the denominator of MFU.

    The data sheet's of a known GPU (TF32 is off, so fp32 means plain float32), else `measured_flops`.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device).lower().replace(" ", "")
        known = next((known for known in ACCELERATORS.values() if known.name in name), None)
        if known is not None and not (known.name in ("h100", "h200") and any(board in name for board in OTHER_BOARDS)):
            return known.peak_flops(precision)
    return measured_flops(device, torch.bfloat16 if precision == "bf16" else torch.float32)


def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second that a square matrix product of this dtype reaches here: the best of five short trials.

    It takes a fraction of a second. On a CPU it uses this rank's threads and shares the machine with other processes.
    """
    size = 4096 if device.type == "cuda" else 512
    a = torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(5):
        _wait(device)
        begin = time.perf_counter()
        for _ in range(4):
            torch.matmul(a, a)
        _wait(device)
        best = min(best, (time.perf_counter() - begin) / 4)
    return 2.0 * size**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
