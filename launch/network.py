"""Build the network a configuration describes, on this rank's device."""

from functools import partial

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from launch.config import RunConfig
from model.decoder import Decoder, initialise
from model.parallel import Topology, tensor_parallel


def network(config: RunConfig, topology: Topology, recompute: str = "none") -> Decoder:
    """The decoder with its initial weights, recomputation and compilation applied.

    Args:
        recompute: none, selective or full (auto is decided before, by the planner).
    """
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    kit = tensor_parallel(topology, config.parallel.sequence_parallel, dtype)
    with topology.device:  # from the first tensor on: ranks of a node that built on the CPU would all fill its memory
        model = Decoder(config.model, config.position, config.train.sequence_length, kit)
    initialise(model, config.run.seed)
    match recompute:
        case "none":
            pass
        case "full":
            model.run_block = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        case "selective":
            contexts = partial(create_selective_checkpoint_contexts, _keep_products)
            model.run_block = partial(checkpoint, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
        case _:
            raise ValueError(f"train.recompute = '{recompute}'; legal: none, selective, full, auto")
    if config.train.compile:
        model.lm_head.compiled = True
        for block in model.model.layers:
            block.compile()
    return model


def _keep_products(context: object, operation: object, *arguments: object, **keywords: object) -> CheckpointPolicy:
    """Keep what is dear to make again (matrix products, attention); norms, rotations and SiLU are cheap."""
    name = str(operation)
    dear = any(part in name for part in ("aten.mm", "aten.addmm", "aten.bmm", "attention", "tiglon::"))
    return CheckpointPolicy.MUST_SAVE if dear else CheckpointPolicy.PREFER_RECOMPUTE
