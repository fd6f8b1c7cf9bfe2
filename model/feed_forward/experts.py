"""The routed experts of a layer: SwiGLU networks of a stack, each on the tokens that the router sends it.

Every token is copied once per expert that it goes to, the copies are sorted by expert, multiplied group by group
(model/feed_forward/grouped.py), and the results summed per token in the order of the router's choice. No token is dropped,
however uneven the loads, and no sum depends on the order in which threads finish. Where ranks have different experts, sorted
copies are sorted by rank too, and travel (model/parallel/expert.py).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.feed_forward.grouped import grouped_linear
from model.feed_forward.router import group_ends
from model.parallel.expert import Exchange, Splits
from model.parallel.layers import Kit
from model.sublayer import StreamConfig


class Experts(nn.Module):
    """down(silu(gate(x)) * up(x)) of each expert, its hidden units split over tensor-parallel ranks: each returns a part of the
    sum. The weight of an expert multiplies its hidden units, so that no gradient needs what an expert returns."""

    def __init__(self, config: StreamConfig, experts: int, width: int, kit: Kit):
        super().__init__()
        D = config.hidden_size
        self.count, self.ranks = experts, kit.experts
        self.gate_proj = kit.experts_column(experts, D, width, config.initial)
        self.up_proj = kit.experts_column(experts, D, width, config.initial)
        self.down_proj = kit.experts_row(experts, width, D, config.residual_initial)
        self.recomputed = False
        """Whether the backward recomputes all that the products make: only copies and their weights are kept."""

    def forward(self, h_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor) -> Tensor:
        """The weighted sum of each token's experts, y_TD, where this rank has all of them."""
        plan = Sorted.by_group(expert_TK, self.count)
        h_ND, weight_N = _Spread.apply(h_TD, plan), _Permuted.apply(weight_TK.flatten(), plan)
        return _Gathered.apply(self._multiply(h_ND, weight_N, plan.ends_E), plan, False)  # type: ignore[return-value]

    @torch.compiler.disable
    def send(self, h_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor) -> "Dispatched":
        """Begin to send copies of tokens to the ranks of their experts; `receive` gives what forward would.

        Uncompiled: sizes change from pass to pass, and code for the first ones would not be that of a run which resumes.
        """
        plan = Sorted.by_group(expert_TK, self.count)
        h_ND, weight_N = _Spread.apply(h_TD, plan), _Permuted.apply(weight_TK.flatten(), plan)
        splits, received_Ne = self.ranks.tell(plan.counts)
        copies, weights = (self.ranks.begin(x, splits) for x in (h_ND, weight_N))  # type: ignore[arg-type]
        return Dispatched(plan, splits, received_Ne, copies, weights)

    @torch.compiler.disable
    def receive(self, sent: "Dispatched") -> Tensor:
        """The weighted sum of each token's experts, y_TD."""
        own = Sorted.of_runs(sent.received_Ne)
        h_MD, weight_M = _Spread.apply(sent.copies.result(), own), _Permuted.apply(sent.weights.result(), own)
        y_MD: Any = _Gathered.apply(self._multiply(h_MD, weight_M, own.ends_E), own, False)
        return _Gathered.apply(self.ranks.begin(y_MD, sent.splits.back).result(), sent.plan, True)  # type: ignore[return-value]

    def _multiply(self, h_ND: Any, weight_N: Any, ends_E: Tensor) -> Tensor:
        if not self.recomputed:
            return self.multiply(h_ND, weight_N, ends_E)
        again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        return again(self.multiply, h_ND, weight_N, ends_E)  # type: ignore[return-value]

    def multiply(self, h_ND: Tensor, weight_N: Tensor, ends_E: Tensor) -> Tensor:
        """Each row by its expert, times its weight: [N, D] from rows that are sorted by expert."""
        gate_NF, up_NF = grouped_linear(h_ND, self.gate_proj, ends_E), grouped_linear(h_ND, self.up_proj, ends_E)
        hidden_NF = (F.silu(gate_NF) * up_NF * weight_N[:, None]).to(h_ND.dtype)
        return grouped_linear(hidden_NF, self.down_proj, ends_E)


@dataclass(frozen=True)
class Dispatched:
    """Copies of tokens on their way to the ranks of their experts."""

    plan: "Sorted"
    splits: Splits
    received_Ne: Tensor
    """How many come from each rank for each of this rank's experts."""
    copies: Exchange
    weights: Exchange


@dataclass(frozen=True)
class Sorted:
    """Copies of tokens, N = T * K, sorted by expert; those of an expert in the order of tokens."""

    order_N: Tensor
    """Index t * K + k of each sorted copy."""
    place_TK: Tensor
    """Where each copy is in the sorted order."""
    ends_E: Tensor
    """int32, past-the-last copy of each expert."""

    @classmethod
    def by_group(cls, expert_TK: Tensor, experts: int) -> "Sorted":
        """From the expert of each copy."""
        flat = expert_TK.flatten()
        values, order_N = flat.sort(stable=True)
        place = torch.empty_like(order_N)
        place[order_N] = torch.arange(len(order_N), device=flat.device)
        return cls(order_N, place.view_as(expert_TK), group_ends(values, experts).int())

    @classmethod
    def of_runs(cls, count_RE: Tensor) -> "Sorted":
        """Of copies that came in runs: those of one rank for each expert, one rank after the other."""
        experts = torch.arange(count_RE.shape[1], device=count_RE.device).repeat(len(count_RE))
        return cls.by_group(experts.repeat_interleave(count_RE.flatten())[:, None], count_RE.shape[1])

    @property
    def tokens(self) -> Tensor:
        """Of each sorted copy."""
        return self.order_N // self.place_TK.shape[1]

    @property
    def counts(self) -> Tensor:
        """Copies for each expert, int64."""
        return self.ends_E.diff(prepend=self.ends_E.new_zeros(1)).long()


class _Spread(torch.autograd.Function):
    """Copies of tokens in sorted order."""

    @staticmethod
    def forward(ctx: Any, h_TD: Tensor, plan: Sorted) -> Tensor:
        ctx.save_for_backward(plan.place_TK)  # as an attribute it would stay where a block is recomputed
        return h_TD[plan.tokens]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (place_TK,) = ctx.saved_tensors
        return gradient[place_TK].sum(1), None


class _Permuted(torch.autograd.Function):
    """Weights in sorted order."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, plan: Sorted) -> Tensor:
        ctx.save_for_backward(plan.place_TK)
        return weight[plan.order_N]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (place_TK,) = ctx.saved_tensors
        return gradient[place_TK.flatten()], None


class _Gathered(torch.autograd.Function):
    """The sum of each token's copies. `arrived`: they come from an exchange, which recomputation need not repeat as long as
    nothing behind it is saved; the order is kept then (8 bytes per copy)."""

    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, plan: Sorted, arrived: bool) -> Tensor:
        if arrived:
            ctx.order_N = plan.order_N
        else:
            ctx.save_for_backward(plan.order_N)
        ctx.copies = plan.place_TK.shape[1]
        return y_ND[plan.place_TK].sum(1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (order_N,) = ctx.saved_tensors or (ctx.order_N,)
        return gradient[order_N // ctx.copies], None, None
