"""Held-out loss: the mean over every scored token, and how far chance may have moved it."""

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.config import PositionConfig
from model.parallel import Topology
from trainer.engine import Batch, on_device


@dataclass(frozen=True)
class Score:
    """Loss of a set of tokens."""

    loss: float
    """Mean over the tokens of all ranks, in nats per token."""
    tokens: int
    """Scored tokens of all ranks."""
    context: int
    """Tokens of a row."""
    standard_error: float | None
    """Of the mean, in nats per token; None for fewer than two rows with scored tokens (see `evaluate`)."""

    def record(self, step: int, name: str) -> dict[str, Any]:
        """The record of metrics.jsonl."""
        found = {"kind": "evaluate", "step": step, "name": name, "context": self.context, "loss": self.loss}
        found["tokens"] = self.tokens
        return found if self.standard_error is None else found | {"standard_error": self.standard_error}


@torch.no_grad()
def evaluate(
    model: Any,
    batches: Iterable[Batch],
    topology: Topology,
    position: PositionConfig | None = None,
    beat: Callable[[], None] = lambda: None,
) -> Score:
    """Mean loss over all batches of all data-parallel ranks, every target counted once.

    The standard error takes the rows as independent draws: with loss sums l_r and token counts n_r of R rows and the mean
    m = sum(l) / sum(n) it is sqrt(R / (R - 1) * sum((l_r - m n_r)^2)) / sum(n), the usual one of a ratio. Tokens of a row
    depend on each other, which it allows for; rows of one document do too, which it does not.

    Args:
        model: the decoder, alike on every rank that calls.
        batches: this rank's micro-batches; every rank brings as many, of the same shape.
        topology: where this rank stands.
        position: the map to evaluate with; default the model's own.
        beat: called after every batch.

    Raises:
        ValueError: no target is scored.
    """
    sums = torch.zeros(6, dtype=torch.float64, device=topology.device)
    context = 0
    with _compiled_as_trained(model, position):
        for batch in batches:
            inputs, targets, cu_seqlens = on_device(batch, topology.device)
            loss_B, count_B = model(inputs, targets, cu_seqlens=cu_seqlens, position=position, by_row=True)
            sums += _sums(loss_B.double(), count_B.double())
            context = inputs.shape[1]
            beat()
    topology.sum(sums, topology.data_group)
    return _score(sums.tolist(), context)


def _compiled_as_trained(model: Any, position: PositionConfig | None) -> AbstractContextManager[Any]:
    """Compiled blocks are left alone by another map.

    It would have them compiled again, for more general inputs, and training could go on with that code: other bits than a
    run that resumes after the evaluation.
    """
    same = position is None or position == model.position
    return nullcontext() if same else torch.compiler.set_stance("force_eager")


def _sums(loss_B: Tensor, count_B: Tensor) -> Tensor:
    """Over rows: losses, targets, their squares and product, and rows that score anything; float64 [6]."""
    parts = (loss_B, count_B, loss_B.square(), loss_B * count_B, count_B.square(), (count_B > 0).double())
    return torch.stack([part.sum() for part in parts])


def _score(sums: list[float], context: int) -> Score:
    loss, tokens, loss_squares, products, token_squares, rows = sums
    if not tokens:
        raise ValueError("the evaluation data have no token to score; give more of them")
    mean = loss / tokens
    squares = max(0.0, loss_squares - 2 * mean * products + mean**2 * token_squares)
    error = math.sqrt(rows / (rows - 1) * squares) / tokens if rows > 1 else None
    return Score(mean, int(tokens), context, error)


def evaluate_context(
    model: Any,
    batches: Iterable[Batch],
    topology: Topology,
    position: PositionConfig | None = None,
    beat: Callable[[], None] = lambda: None,
) -> Score:
    """`evaluate` with batches of any shape: compiled blocks are not compiled again, and no length need divide anything."""
    with torch.compiler.set_stance("force_eager"), model.kit.tokens_whole():
        return evaluate(model, batches, topology, position, beat)
