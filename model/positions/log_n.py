"""Scales of the queries: log n scaling, and the factor of the map (YaRN's temperature)."""

import math

import torch
from torch import Tensor

from model.positions.config import PositionConfig


def query_scale(position: PositionConfig, index: Tensor, trained_length: int) -> Tensor | None:
    """Factor on the query of the token at `index` (from 0) of its document, float64 in the shape of `index`; None = 1.

    log n (Su 2021, kexue.fm/archives/8823): n = index + 1 keys are visible; log n / log L with L = trained_length, unclipped
    where the network is trained with it, at least 1 where only evaluated with it. Times the factor of the map.
    """
    n = index.double() + 1
    match position.log_n:
        case "none":
            scale = None
        case "trained":
            scale = n.log() / math.log(trained_length)
        case "inference":
            scale = (n.log() / math.log(trained_length)).clamp(min=1.0)
        case _:
            raise ValueError(f"position.log_n = '{position.log_n}' is unknown")
    factor = position.map.query_scale()
    if factor != 1:
        scale = torch.full_like(n, factor) if scale is None else scale * factor
    return scale
