"""Held-out loss: the mean over everything, and by context with the same last tokens scored each time (kexue 9948)."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.config import PositionConfig
from model.parallel import Topology
from trainer.engine import Batch

NOT_SCORED = -100


@dataclass(frozen=True)
class Score:
    """Loss of a set of tokens."""

    loss: float
    """Mean over the tokens of all ranks, in nats."""
    tokens: int
    """Scored tokens of all ranks."""
    context: int
    """Tokens of a sequence."""


@dataclass(frozen=True)
class Cut:
    """A micro-batch cut to its last tokens."""

    inputs_BS: Tensor
    targets_BS: Tensor
    cu_seqlens: Tensor | None


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[Sequence[Batch]], topology: Topology, position: PositionConfig | None = None
) -> Score:
    """Mean loss over all batches of all data-parallel ranks, every target counted once.

    Args:
        model: the decoder, alike on every rank that calls.
        batches: for each step, this rank's micro-batches; every rank brings as many steps.
        topology: where this rank stands.
        position: the map to read with; default the model's own.

    Raises:
        ValueError: no target is scored.
    """
    total = torch.zeros(2, dtype=torch.float64, device=topology.device)
    length = 0
    for batch in (batch for step in batches for batch in step):
        inputs, targets = (x.to(topology.device, non_blocking=True) for x in (batch.inputs_BS, batch.targets_BS))
        loss_sum, count = model(inputs, targets, cu_seqlens=batch.cu_seqlens, position=position)
        total += torch.stack((loss_sum.double(), count.double()))
        length = inputs.shape[1]
    topology.sum(total, topology.data_group)
    loss_sum, tokens = total.tolist()
    if not tokens:
        raise ValueError("the evaluation data have no token to score; give more of them or fewer ranks")
    return Score(loss_sum / tokens, int(tokens), length)


def evaluate_contexts(
    model: nn.Module,
    batches: Sequence[Sequence[Batch]],
    contexts: list[int],
    topology: Topology,
    position: PositionConfig | None = None,
) -> Iterator[Score]:
    """Loss of the same last tokens of every sequence, seen with each context length in turn.

    The last half of the shortest context is scored, at every context: only what comes before it changes.

    Args:
        model, topology, position: as `evaluate`.
        batches: sequences at least as long as the longest context.
        contexts: lengths in tokens.

    Raises:
        ValueError: a context is shorter than 2 tokens or longer than the sequences.
    """
    longest = batches[0][0].inputs_BS.shape[1] if batches else 0
    for context in contexts:
        if not 2 <= context <= longest:
            raise ValueError(f"context {context} must lie between 2 and {longest} tokens, the length of the sequences")
    scored = min(contexts) // 2
    for context in contexts:
        cuts: Iterator[Sequence[Batch]] = ([last(batch, context, scored) for batch in step] for step in batches)
        with torch.compiler.set_stance("force_eager"):  # other shapes would make compiled blocks compile again
            score = evaluate(model, cuts, topology, position)
        yield score


def last(batch: Batch, context: int, scored: int) -> Cut:
    """The last `context` tokens of every row, of which the last `scored` targets count."""
    B, S = batch.inputs_BS.shape
    targets = batch.targets_BS[:, -context:].clone()
    targets[:, :-scored] = NOT_SCORED
    bounds = None if batch.cu_seqlens is None else _last_bounds(batch.cu_seqlens, B, S, context)
    return Cut(batch.inputs_BS[:, -context:], targets, bounds)


def _last_bounds(cu_seqlens: Tensor, B: int, S: int, context: int) -> Tensor:
    """Document boundaries of the cut rows: those inside them, and the rows' own."""
    row, place = cu_seqlens // S, cu_seqlens % S - (S - context)
    inside = (row * context + place)[(place > 0) & (row < B)]
    rows = torch.arange(B + 1, device=cu_seqlens.device) * context
    return torch.cat((inside, rows)).unique().to(torch.int32)
