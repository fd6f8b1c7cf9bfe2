"""Build the network a configuration describes, on this rank's device."""

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from launch.config import RunConfig
from model.decoder import Decoder
from model.feed_forward.experts import Experts
from model.flops import stage_bounds
from model.initialization import initialise
from model.parallel.mesh import Mesh, make_kit
from model.recompute import selective_contexts, selective_policy

RECOMPILE_LIMIT = 8
"""Torch's default: variants of a block that are compiled before it runs eagerly."""


def build_network(config: RunConfig, mesh: Mesh, recompute: str = "none") -> Decoder:
    """The decoder with its initial weights, recomputation, compilation and CUDA graphs applied.

    Args:
        recompute: none, experts, selective or full (auto is decided before, by the planner).
    """
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    parallel, length = config.parallel, config.train.sequence_length
    kit = make_kit(mesh, parallel.sequence_parallel, dtype, parallel.context_exchange, _bounds(config))
    with mesh.device:  # else every rank of a node would build the whole network in host memory first
        model = Decoder(config.model, config.position, length, kit)
    initialise(model, config.run.seed)
    match recompute:
        case "none":
            pass
        case "experts":
            for experts in (module for module in model.modules() if isinstance(module, Experts)):
                experts.recomputed = True
        case "full":
            model.run_block = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        case "selective":
            kept: Any = (
                partial(create_selective_checkpoint_contexts, selective_policy) if config.train.compile else selective_contexts
            )
            model.run_block = partial(checkpoint, use_reentrant=False, preserve_rng_state=False, context_fn=kept)
        case _:
            raise ValueError(f"train.recompute = '{recompute}'; legal: none, experts, selective, full, auto")
    if config.train.compile:
        _compile_each_length(len({*config.train.row_lengths}))
        model.compiled = True
        if model.lm_head is not None:
            model.lm_head.compiled = True
        for block in model.blocks:
            block.self_attn.compiled = True
        # Recomputation is compiled with the block: applied outside, it would keep tensors that compiled code overwrites.
        options: Any = {"triton.cudagraphs": True} if config.train.cuda_graphs else None
        model.run_block = torch.compile(model.run_block, options=options)
    if config.train.cuda_graphs:
        model.begin = torch.compiler.cudagraph_mark_step_begin  # else torch guesses where a forward pass begins
    return model


def _bounds(config: RunConfig) -> tuple[int, ...]:
    """Of the stages of a pipeline, if there are any."""
    several = config.parallel.pipeline_parallel_size > 1
    return stage_bounds(config.model, config.train.sequence_length, config.parallel.pipeline_stages) if several else ()


def _compile_each_length(lengths: int) -> None:
    """Tell torch how many lengths of rows there are. After a second one it would compile code for any length, with other bits
    than those of a run that resumes there, and no more than eight kinds of blocks and lengths."""
    torch._dynamo.config.automatic_dynamic_shapes = lengths == 1
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT * lengths
