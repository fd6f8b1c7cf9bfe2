"""QK-Clip (Su 2025, "QK-Clip: Muon one step further", kexue.fm/archives/11126): after a step, heads whose logits were above a
limit get smaller queries and keys, so that the largest logit of those tokens would be the limit.

Weight decay and learning rate bound a weight's norm but no logit, which is a product of two; Muon, whose steps have full rank,
lets logits grow more than others. The forward of a step records a bound of each head's largest logit
(model/attention/base.py, record_logits); each kind of attention says which rows of which weights make it
(Attention.logit_rows); the update multiplies these rows after the rules have moved them, whatever the rules.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from model.attention.base import Attention
from model.parallel.mesh import Mesh


@dataclass(frozen=True)
class StepLogits:
    """What the forward passes of a step have shown; tensors on the device, alike on all ranks."""

    largest: Tensor | None = None
    """Of all heads and layers, 0-dim."""
    heads_above: Tensor | None = None
    """Heads whose largest logit is above the limit, 0-dim."""
    row_factors: Mapping[str, Tensor] = field(default_factory=dict)
    """By parameter: float64, of the rows of a full matrix or the elements of a full vector; 1 where nothing is clipped."""


class QKClip:
    """The largest logit of every head in a step, and the factors that follow.

    Args:
        model: whose attention layers begin to record.
        limit: tau, optimizer.qk_clip; None = nothing is recorded and no factor follows.
        mesh: heads are split over its tensor-parallel ranks, tokens over its replicas, layers over its pipeline.
    """

    def __init__(self, model: nn.Module, limit: float | None, mesh: Mesh):
        self._limit, self._mesh = limit, mesh
        layers = {} if limit is None else {n: layer for n, layer in model.named_modules() if isinstance(layer, Attention)}
        self._layers = list(layers.values())
        parameters = dict(model.named_parameters())
        self._counts: dict[str, int] = {}
        heads, powers = [], []
        for index, (name, layer) in enumerate(layers.items()):
            layer.record_logits(mesh.device)
            for linear, rows in layer.logit_rows().items():
                for own in (f"{name}.{linear}.{part}" for part in ("weight", "bias")):
                    if own in parameters:
                        self._counts[own] = len(rows.head_R)
                        heads.append(rows.head_R + index * layer.query_heads)
                        powers.append(rows.power_R)
        if layers:  # of all weights together: few launches, however many layers
            self._heads, self._powers = (torch.cat(parts).to(mesh.device) for parts in (heads, powers))

    def begin(self) -> None:
        """A step begins: forget what was recorded."""
        for layer in self._layers:
            assert layer.largest_logit_n is not None
            layer.largest_logit_n.fill_(float("-inf"))

    @torch.no_grad()
    def finish(self) -> StepLogits:
        """What the step's micro-batches on all ranks have shown; all ranks call it."""
        if self._limit is None:
            return StepLogits()
        own_Ln = torch.stack([layer.largest_logit_n for layer in self._layers if layer.largest_logit_n is not None]).double()
        ranks, share = self._mesh.tensor, own_Ln.shape[1]
        largest_LN = own_Ln.new_full((len(own_Ln), share * ranks.size), float("-inf"))
        largest_LN[:, share * ranks.rank : share * (ranks.rank + 1)] = own_Ln
        largest_LN = self._mesh.replicas.max(ranks.max(largest_LN))
        above_LN = largest_LN > self._limit
        factor_LN = torch.where(above_LN, self._limit / largest_LN, 1.0)
        factors = factor_LN.flatten()[self._heads] ** self._powers
        by_name = dict(zip(self._counts, factors.split(list(self._counts.values())), strict=True))
        pipeline = self._mesh.pipeline
        return StepLogits(pipeline.max(largest_LN.max().float()), pipeline.sum(above_LN.sum()), by_name)
