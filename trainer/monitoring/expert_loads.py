"""The loads of experts as records: one number of the step, and the shares of every expert by layer."""

from typing import Any

from torch import Tensor

from trainer.optimizers.expert_balance import StepLoads

DECIMALS = 6
"""Of a share: four digits of an even load of 256 experts, of which a large network records thousands."""


def load_summary(loads: StepLoads) -> dict[str, Tensor]:
    """For the record of the step; nothing in a network without experts."""
    largest = loads.largest_share
    return {} if largest is None else {"expert_load_max": largest}


def load_records(loads: StepLoads, step: int) -> list[dict[str, Any]]:
    """One record per layer with experts. Waits for the device once, for all layers.

    `load` is each expert's share of the layer's choices; `largest` and `smallest` are the ends of them over 1/E, the share of
    even loads.
    """
    if loads.token_LE is None:
        return []
    shares_LE = loads.token_LE.double()
    shares_LE = shares_LE / shares_LE.sum(1, keepdim=True).clamp(min=1)
    return [
        {
            "kind": "experts",
            "step": step,
            "name": f"layer-{layer}",
            "largest": max(shares) * len(shares),
            "smallest": min(shares) * len(shares),
            "load": [round(share, DECIMALS) for share in shares],
        }
        for layer, shares in zip(loads.layers, shares_LE.tolist(), strict=True)
    ]
