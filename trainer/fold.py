"""Tiger without gradients: each is folded into the momentum as soon as the backward has made it, and freed.

Tiger's momentum is linear in the gradient, so the mean over micro-batches and ranks can be taken in the momentum itself
(kexue 8634). The training state is the weights and the momentum: 4 bytes a parameter in bfloat16, both rounded
stochastically, or 8 in float32. A step sends the momentum once.

What needs the whole mean gradient cannot be here: clipping by the global norm (Tiger's sign bounds each step by
itself), Lion, AdamW. trainer/optimizer.py refuses them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from model.parallel import Topology
from trainer import onepass, rounding, tiger
from trainer.buckets import Buckets
from trainer.checkpoint import Shard
from trainer.clock import Clock
from trainer.config import OptimizerConfig
from trainer.engine import Batch, count_targets, on_device, shards_of
from trainer.fragments import Block, Fragment, block_limit, blocks, whole_fragments
from trainer.optimizer import Update, allocate, differ_by_row, rate_and_decay, rate_in, rates_and_decays, row_mask, wanted
from trainer.totals import Totals, sum_of_squares, totals, wide


class Fold:
    """The engine whose momentum is the accumulator.

    Args:
        model: the decoder, initialised, on its device; its parameters carry `logical` and are trained in their dtype.
        settings: Tiger, without clipping.
        topology: where this rank stands.
        seed: of the rounding.
        rms_floor: least RMS that scales Tiger's rate of a parameter, by its name.
        bucket_numbers: numbers sent in one collective.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: OptimizerConfig,
        topology: Topology,
        *,
        seed: int,
        rms_floor: Mapping[str, float],
        bucket_numbers: int,
    ):
        self.model, self.settings, self.topology = model, settings, topology
        self.seed, self.rms_floor, self.steps_done = seed, rms_floor, 0
        self.clock = Clock(topology.device)
        self.before_backward: Callable[[], object] = lambda: None
        """Called once a step, before the momentum begins to change."""
        self._fragments = whole_fragments(model, topology)
        allocate(self._fragments, settings)
        self._by_name = {fragment.name: fragment for fragment in self._fragments}
        self._last = False
        self._touched: set[str] = set()
        self._square: Any = 0.0
        self._rounded = settings.rounding != "nearest" and self._fragments[0].values.dtype == torch.bfloat16
        self._compiled = bool(settings.compile) and self._rounded
        places = [_place(fragment) for fragment in self._fragments]
        self._draws = rounding.Draws(places, topology.device, self._compiled) if self._rounded else None
        self._folding: dict[str, rounding.Draw | None] = {}
        self._averaging: dict[str, rounding.Draw | None] = {}
        self._rows = _Rows(self._fragments, topology) if self._compiled else None
        self._seen_V: Tensor | None = None
        backwards = {fragment.name: fragment.momentum() for fragment in reversed(self._fragments)}
        self._buckets = Buckets(
            backwards, topology.data_group, topology.data_parallel_size, bucket_numbers, self._take_mean
        )  # fmt: skip
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._hook(self._by_name[name]))
            for name, parameter in model.named_parameters()
        ]

    def accumulate(self, batches: Sequence[Batch]) -> Tensor:
        """Forward and backward of every micro-batch of one update; see Engine. Afterwards the momentum is complete."""
        topology = self.topology
        count = count_targets(batches, topology)
        total = torch.zeros((), device=topology.device)
        for index, batch in enumerate(batches):
            self._begin(index, last=index + 1 == len(batches))
            inputs, targets, boundaries = on_device(batch, topology.device)
            loss_sum, _ = self.model(inputs, targets, cu_seqlens=boundaries)
            self.clock.mark("forward")
            if index == 0:
                self.before_backward()
            # Momenta are averaged over data ranks, so each rank's share of the mean counts that many times.
            (loss_sum * (topology.data_parallel_size / count)).backward()
            self.clock.mark("backward")
            total += loss_sum.detach()
        for fragment in self._fragments:
            if fragment.name not in self._touched:
                self._fold(fragment, None)
        self._buckets.finish()
        self._folding = self._averaging = {}
        if self._rows is not None:
            self._square = self._square + self._rows.total()
        self._square = self._square * len(batches) / topology.data_parallel_size
        if self.settings.embedding == "lazy":
            self._seen_V = row_mask([batch.inputs_BS for batch in batches], self._embedding_rows(), topology)
        return topology.sum(total, topology.data_group) / count

    @torch.no_grad()
    def update(self, learning_rate: float, skip: bool = False) -> Update:
        """Move the weights along the sign of the momentum; see Engine.

        `skip` leaves the weights alone, but the momentum has taken the gradients already. `grad_norm` is the root mean
        square of the norms of the micro-batch gradients: that of the mean gradient if there is one micro-batch on one
        rank, above it otherwise.
        """
        self.steps_done += 1
        sized, by_row = wanted(self._fragments, self.settings)
        found = totals(
            self._fragments, self.topology, sized=sized, by_row=by_row, partitioned=False, gradient_square=self._square
        )  # fmt: skip
        bad: Any = ~torch.isfinite(found.gradient_norm) | skip
        skipped = bad
        if bad.device.type == "cpu":
            bad = bool(bad)
        shrink, draws = self.settings.non_finite == "shrink" and not skip, self._draw("weight")
        if self._compiled and not shrink:
            self._move_at_once(learning_rate, found, bad, draws)
            return Update(grad_norm=found.gradient_norm.float(), skipped=skipped)
        for fragment in self._fragments:
            rate, decay = self._rate_and_decay(fragment, learning_rate, found)
            self._move(fragment, rate, decay, bad, shrink, draws[fragment.name])
        return Update(grad_norm=found.gradient_norm.float(), skipped=skipped)

    def fragments(self) -> list[Fragment]:
        """Every parameter's slice on this tensor-parallel rank, alike on all data-parallel ranks."""
        return self._fragments

    def shards(self) -> list[Shard]:
        """Weights and momentum by name."""
        topology = self.topology
        split = (topology.data_parallel_rank, topology.data_parallel_size)
        return shards_of(self._fragments, split=split, replicated=(topology.rank, topology.world_size))

    def loaded(self, step: int) -> None:
        """The shards are the network's own weights; only the counter of the rounding has to follow."""
        self.steps_done = step

    def close(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()

    def _embedding_rows(self) -> int:
        return next(fragment.shape[0] for fragment in self._fragments if fragment.kind == "embedding")

    def _hook(self, fragment: Fragment) -> Any:
        def fold(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            self._fold(fragment, gradient.reshape(-1))
            if self._last:
                self._buckets.done(fragment.name)

        return fold

    def _begin(self, index: int, last: bool) -> None:
        """Make ready for the backward of a micro-batch."""
        self._last = last
        if index == 0:
            self._touched.clear()
            self._square = 0.0
            if self._rows is not None:
                self._rows.squares.zero_()
        self._folding = self._draw("momentum", index)

    @torch.no_grad()
    def _fold(self, fragment: Fragment, gradient: Tensor | None) -> None:
        """One micro-batch's gradient into the momentum; beta acts once a step. What is not finite adds nothing."""
        beta = self.settings.coefficients[0]
        momentum, decay = fragment.momentum(), 1.0 if fragment.name in self._touched else beta
        self._touched.add(fragment.name)
        draw = self._folding[fragment.name]
        if self._rows is not None and gradient is not None:
            assert draw is not None
            numbers, squares = self._rows.numbers(decay, 1.0 - beta), self._rows.of(fragment)
            onepass.compiled(onepass.fold)(*_rows(fragment, momentum, gradient), squares, numbers, draw.a, draw.b, draw.h)
            return
        if gradient is not None:
            share = 1.0 / self.topology.tensor_parallel_size if fragment.replicated else 1.0
            square = sum_of_squares(gradient)
            self._square = self._square + share * square
            if isinstance(square, Tensor) or square - square != 0.0:  # not known without waiting, or infinite or NaN
                gradient.masked_fill_(~(gradient.abs() < onepass.LARGEST), 0.0)
        for block in self._blocks(fragment):
            old = block.of(momentum)
            new = wide(old)
            tiger.fold_(new, None if gradient is None else wide(block.of(gradient)), decay, 1.0 - beta)
            _store(block, old, new, draw)

    def _take_mean(self, name: str, mean: Tensor) -> None:
        fragment = self._by_name[name]
        if not self._averaging:
            self._averaging = self._draw("mean")
        draw = self._averaging[name]
        if self._rows is not None:
            assert draw is not None
            onepass.compiled(onepass.store)(*_rows(fragment, fragment.momentum(), mean), draw.a, draw.b, draw.h)
            return
        for block in self._blocks(fragment):
            _store(block, block.of(fragment.momentum()), block.of(mean), draw)

    def _rate_and_decay(self, fragment: Fragment, learning_rate: float, found: Totals) -> tuple[Any, float]:
        rms = found.row_rms.get(fragment.name, found.rms.get(fragment.name, 0.0))
        return rate_and_decay(fragment, self.settings, learning_rate, rms, self.rms_floor, self._seen_V)

    def _move_at_once(self, learning_rate: float, found: Totals, bad: Any, draws: Mapping[str, rounding.Draw | None]) -> None:
        """One compiled pass for each weight; the rates of all are made together."""
        if bad is True:
            return
        alike = [fragment for fragment in self._fragments if not differ_by_row(fragment, self.settings)]
        rates, decays = rates_and_decays(alike, self.settings, learning_rate, found, self.rms_floor)
        aligned = nn.functional.pad(_stopped(rates, bad)[:, None], (0, 3)).split(1)  # 16 bytes apart, as compiled kernels ask
        chosen = {f.name: (rate[:, :1], decay) for f, rate, decay in zip(alike, aligned, decays, strict=True)}
        for fragment in self._fragments:
            if fragment.name not in chosen:
                rate, decay = self._rate_and_decay(fragment, learning_rate, found)
                chosen[fragment.name] = _stopped(rate, bad).float()[:, None], decay
        assert self._rows is not None
        for fragment in self._fragments:
            (rate, decay), draw = chosen[fragment.name], draws[fragment.name]
            assert draw is not None
            state = _rows(fragment, fragment.values, fragment.momentum())
            onepass.compiled(onepass.move)(*state, rate, self._rows.numbers(decay)[0], draw.a, draw.b, draw.h)

    def _move(self, fragment: Fragment, rate: Any, decay: float, bad: Any, shrink: bool, draw: rounding.Draw | None) -> None:
        if bad is True and not shrink:
            return
        rate = _stopped(rate, bad)
        for block in self._blocks(fragment):
            old = block.of(fragment.values)
            new = wide(old)
            if bad is not True:
                tiger.move_(new, wide(block.of(fragment.momentum())), rate_in(block, rate, new.dtype), decay)
            if shrink:
                tiger.shrink_(new, fragment.kind, bad)
            _store(block, old, new, draw)

    def _blocks(self, fragment: Fragment) -> Any:
        return blocks(0, fragment.values.numel(), fragment.width, block_limit(fragment.values.device))

    def _draw(self, *purpose: int | str) -> dict[str, rounding.Draw | None]:
        """The random bits of one rounding of every fragment, by its name; None where nothing is rounded stochastically."""
        if self._draws is None:
            return dict.fromkeys(self._by_name)
        keys = [rounding.key(self.seed, self.steps_done, name, *purpose) for name in self._by_name]
        return dict(zip(self._by_name, self._draws.of(keys), strict=True))


class _Rows:
    """What compiled passes take and give beside the tensors, for all fragments: a number for each row, and constants."""

    def __init__(self, fragments: Sequence[Fragment], topology: Topology):
        rows = [rounding.aligned(_place(fragment).rows) for fragment in fragments]
        self._device, self._constants = topology.device, {}
        self.squares = torch.zeros(sum(rows), 1, device=topology.device)
        """Sums of squares of the gradients' rows."""
        parts = self.squares.split(rows)
        self._parts = {f.name: part[: _place(f).rows] for f, part in zip(fragments, parts, strict=True)}
        size = topology.tensor_parallel_size
        shares = torch.tensor([1.0 / size if fragment.replicated else 1.0 for fragment in fragments], dtype=torch.float64)
        self._shares = shares.repeat_interleave(torch.tensor(rows)).to(topology.device) if size > 1 else None

    def of(self, fragment: Fragment) -> Tensor:
        """Its rows of `squares`."""
        return self._parts[fragment.name]

    def total(self) -> Tensor:
        """Of all rows, what several ranks hold by its share; 0-dim float64."""
        wide = self.squares[:, 0].double()
        return wide.sum() if self._shares is None else wide @ self._shares

    def numbers(self, *values: float) -> Tensor:
        """Numbers of the host on the device, sent there once."""
        if values not in self._constants:
            self._constants[values] = onepass.sent(values, self._device)
        return self._constants[values]


def _place(fragment: Fragment) -> rounding.Place:
    start = fragment.slice_start
    row, column = (0, start[0]) if len(start) == 1 else (start[0], start[1])
    return rounding.Place(row, column, fragment.values.numel() // fragment.width, fragment.width)


def _stopped(rate: Any, bad: Any) -> Any:
    """A rate of 0 if nothing is to move."""
    return torch.where(bad, 0.0, rate) if isinstance(bad, Tensor) else rate


def _rows(fragment: Fragment, *flat: Tensor) -> list[Tensor]:
    return [x.view(-1, fragment.width) for x in flat]


def _store(block: Block, old: Tensor, new: Tensor, draw: rounding.Draw | None) -> None:
    """Write numbers back into a block that may be bfloat16; they may be destroyed."""
    if draw is not None:
        draw.round_(old, new, block.row, block.column)
    elif old.data_ptr() != new.data_ptr():
        old.copy_(new)
