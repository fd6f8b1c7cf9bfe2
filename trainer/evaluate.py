"""Held-out loss: the mean over every scored token, and its standard error."""

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.attention.row_cache import RowCache
from model.parallel.mesh import Mesh
from model.positions.batch import TokenLayout
from model.positions.config import PositionConfig
from trainer.engines.base import MicroBatch, on_device


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
        record = {"kind": "evaluate", "step": step, "name": name, "context": self.context, "loss": self.loss}
        record["tokens"] = self.tokens
        return record if self.standard_error is None else record | {"standard_error": self.standard_error}


@torch.no_grad()
def evaluate(
    model: Any,
    batches: Iterable[MicroBatch],
    mesh: Mesh,
    position: PositionConfig | None = None,
    beat: Callable[[], None] = lambda: None,
    chunk_tokens: int = 0,
) -> Score:
    """Mean loss over all batches of all data ranks, every target counted once.

    The standard error is that of a ratio estimate, with the rows as independent samples: with loss sums l_r and token counts
    n_r of R rows and the mean m = sum(l) / sum(n) it is sqrt(R / (R - 1) * sum((l_r - m n_r)^2)) / sum(n). It allows for
    dependence between the tokens of a row, but not between rows of one document.

    Args:
        model: the decoder, alike on every rank that calls.
        batches: this rank's micro-batches; every rank brings as many, of the same shape.
        mesh: this rank's groups.
        position: the map to evaluate with; default: the training map.
        beat: called after every forward: every batch, or every chunk of one.
        chunk_tokens: longer rows pass through the network in chunks of so many tokens (model/attention/row_cache.py), with the
            loss of one forward but for rounding; 0 = none do.

    Raises:
        ValueError: no target is scored.
    """
    sums, context = torch.zeros(6, dtype=torch.float64, device=mesh.device), 0
    with _compiled_as_trained(model, position):
        for batch in batches:
            inputs, targets, cu_seqlens = on_device(batch, mesh.device)
            context = inputs.shape[1]
            if 0 < chunk_tokens < context:
                rows = TokenLayout(len(inputs), context, cu_seqlens)
                losses_2B = _losses_in_chunks(model, inputs, targets, _row_cache(model, rows, position), chunk_tokens, beat)
            else:
                losses_2B = mesh.context.sum(_losses(model, inputs, targets, cu_seqlens=cu_seqlens, position=position))
                beat()
            sums += _sums(*losses_2B)
    mesh.pipeline.sum(mesh.data.sum(sums))
    return _score(sums.tolist(), context)


def _losses(model: Any, inputs_BS: Tensor, targets_BS: Tensor, **options: Any) -> Tensor:
    """Loss sums (nats) and counts of scored targets of each row, of this rank's tokens; float64 [2, B]."""
    loss_B, count_B = model(inputs_BS, targets_BS, by_row=True, **options)
    return torch.stack((loss_B.double(), count_B.double()))


def _row_cache(model: Any, rows: TokenLayout, position: PositionConfig | None) -> RowCache:
    """An empty one, divided among the context-parallel ranks."""
    return RowCache(model.config, position or model.position, model.trained_length, rows, model.kit.context)


def _losses_in_chunks(
    model: Any, inputs_BS: Tensor, targets_BS: Tensor, cache: RowCache, chunk_tokens: int, beat: Callable[[], None]
) -> Tensor:
    """The same of all tokens, alike on all context-parallel ranks."""
    losses_2B = torch.zeros(2, len(inputs_BS), dtype=torch.float64, device=inputs_BS.device)
    with model.kit.sequences_whole():
        for inputs, targets in zip(inputs_BS.split(chunk_tokens, dim=1), targets_BS.split(chunk_tokens, dim=1), strict=True):
            losses_2B += _losses(model, inputs, targets, cache=cache)
            beat()
    return losses_2B


def _compiled_as_trained(model: Any, position: PositionConfig | None) -> AbstractContextManager[Any]:
    """Run the blocks eagerly if the position map is not the training map.

    Compiled blocks would be compiled again, for more general inputs, and training could continue with that code: other bits
    than those of a run that resumes after the evaluation.
    """
    same = position is None or position == model.position
    return nullcontext() if same else torch.compiler.set_stance("force_eager")


def _sums(loss_B: Tensor, count_B: Tensor) -> Tensor:
    """Sums over rows of loss, targets, their squares and product, and the number of rows with scored targets; float64 [6]."""
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
    batches: Iterable[MicroBatch],
    mesh: Mesh,
    position: PositionConfig | None = None,
    beat: Callable[[], None] = lambda: None,
    chunk_tokens: int = 0,
) -> Score:
    """`evaluate` for batches of any shape: blocks run eagerly, and the length need not divide by the tensor-parallel size."""
    with torch.compiler.set_stance("force_eager"), model.kit.tokens_whole():
        return evaluate(model, batches, mesh, position, beat, chunk_tokens)
