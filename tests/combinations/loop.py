"""Training in one process: batches, gradients, schedule, update, and a record of each step."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.combinations.experts import loads, moved
from tests.combinations.network import Batch, Shown, Weights, gradients, micro_gradients
from tests.combinations.optimizers import State, Store, clip_logits, fold, held, start, update
from tests.combinations.schedule import multiplier
from tests.combinations.weights import ROUTER_BIAS, initial_weights
from tests.combinations.weights import floors as least_rms


@dataclass(frozen=True)
class Record:
    """One update."""

    step: int
    """Finished updates, this one included."""
    loss: float
    """Mean over the update's targets, in nats, before it."""
    grad_norm: float
    """Before clipping; under fold see optimizers.fold."""
    learning_rate: float
    logit_bound: float
    """The largest log-sum-exp of any query of any head."""


@dataclass(frozen=True)
class Result:
    """What training came to."""

    records: list[Record]
    state: State

    @property
    def weights(self) -> Weights:
        """Full tensors by name: the masters under zero, what is kept under fold; and the biases of routers."""
        return {**self.state.weights, **self.state.biases}

    @property
    def states(self) -> Weights:
        """Full tensors by their names in a checkpoint: momentum/NAME, second_moment/NAME."""
        both = {"momentum": self.state.momentum, "second_moment": self.state.second_moment}
        return {f"{which}/{name}": tensor for which, tensors in both.items() for name, tensor in tensors.items()}


def train(
    config: Any,
    batches: Callable[[int], Sequence[Batch]],
    steps: int,
    *,
    dtype: torch.dtype = torch.float64,
    first: int = 0,
    state: State | None = None,
    data_ranks: int = 1,
    floors: dict[str, float] | None = None,
    rounding: torch.Generator | None = None,
    neighbours: torch.Generator | None = None,
) -> Result:
    """Make `steps` updates.

    Args:
        config: a RunConfig.
        batches: gives the micro-batches of the update that follows n finished ones, over all ranks, rank after rank.
        steps: updates to make; the schedule's length is train.steps.
        dtype: float64 for the truth. bfloat16 for plain torch in that precision: under zero a bfloat16 network with float32
            masters and moments, under fold bfloat16 weights and momentum.
        first: updates finished before.
        state: weights and moments after those; default the initial weights.
        data_ranks: of the fold engine, whose rounding depends on it in bfloat16.
        floors: Tiger's least RMS by name; default weights.floors.
        rounding: draws errors of the gradients as large as float32 makes them; default none.
        neighbours: draws weights beside those, as far away as bfloat16 rounds, for each update's gradients; default none.
    """
    folded = config.parallel.engine == "fold"
    state = state or start(config, held(initial_weights(config), dtype, folded))
    floors = least_rms(config) if floors is None else floors
    store, records = Store(config, dtype, first), []
    for done in range(first, first + steps):
        micro, factor = batches(done), multiplier(config.schedule, done + 1, config.train.steps)
        seen_V, shown, before = _seen(config, micro), list[Shown](), {**state.weights, **state.biases}
        if folded:
            losses, parts = zip(*micro_gradients(config, beside(before, neighbours), micro, dtype, shown), strict=True)
            loss, parts = sum(losses), [rounded(part, rounding) for part in parts]
            state, size = fold(config, state, parts, factor, floors, seen_V, data_ranks=data_ranks, store=store)
        else:
            loss, found = gradients(config, beside(before, neighbours), micro, dtype, shown)
            state, size = update(config, state, rounded(found, rounding), done + 1, factor, floors, seen_V)
        state.biases = {name: bias for name, bias in before.items() if name not in state.weights}
        if math.isfinite(size):
            state.biases = moved(config, state.biases, loads(config, [one.routed for one in shown]))
        largest_LN = torch.stack([one.largest_LN for one in shown]).amax(dim=0)
        if config.optimizer.qk_clip and math.isfinite(size):
            clip_logits(config, state.weights, largest_LN, store if folded else lambda weight: weight)
        rate = factor * getattr(config.optimizer, config.optimizer.name).learning_rate
        records.append(Record(done + 1, loss, size, rate, largest_LN.max().item()))
    return Result(records, state)


def _seen(config: Any, micro: Sequence[Batch]) -> Tensor:
    """Which rows of the vocabulary are inputs of the update, bool."""
    seen = torch.zeros(config.model.vocab_size, dtype=torch.bool)
    for inputs_BS, _, _ in micro:
        seen[inputs_BS.flatten()] = True
    return seen


ERROR = 1e-6
"""Of a gradient in float32, in units of its root mean square."""


def rounded(gradients: Weights, rounding: torch.Generator | None) -> Weights:
    """Gradients with errors; zeros stay zeros."""
    if rounding is None:
        return gradients
    errors = {name: torch.randn(g.shape, dtype=g.dtype, generator=rounding) * (g != 0) for name, g in gradients.items()}
    return {name: g + ERROR * g.square().mean().sqrt() * errors[name] for name, g in gradients.items()}


def beside(weights: Weights, neighbours: torch.Generator | None) -> Weights:
    """Weights moved by up to half the distance between two numbers of bfloat16; the biases of routers stay."""
    if neighbours is None:
        return weights
    shares = {name: 2 * torch.rand(w.shape, dtype=w.dtype, generator=neighbours) - 1 for name, w in weights.items()}
    return {name: w if name.endswith(ROUTER_BIAS) else w * (1 + 2**-8 * shares[name]) for name, w in weights.items()}
