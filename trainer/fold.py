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
from trainer.optimizer import Update, allocate, rate_and_decay, rate_in, row_mask, wanted
from trainer.totals import sum_of_squares, totals, wide


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
        self._micro_batch, self._last = 0, False
        self._touched: set[str] = set()
        self._square: Any = 0.0
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
        self._touched.clear()
        self._square = 0.0
        for index, batch in enumerate(batches):
            self._micro_batch, self._last = index, index + 1 == len(batches)
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
        for fragment in self._fragments:
            rms = found.row_rms.get(fragment.name, found.rms.get(fragment.name, 0.0))
            rate, decay = rate_and_decay(fragment, self.settings, learning_rate, rms, self.rms_floor, self._seen_V)
            self._move(fragment, rate, decay, bad, shrink=self.settings.non_finite == "shrink" and not skip)
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

    @torch.no_grad()
    def _fold(self, fragment: Fragment, gradient: Tensor | None) -> None:
        """One micro-batch's gradient into the momentum; beta acts once a step. A bad gradient adds nothing."""
        beta = self.settings.coefficients[0]
        weight: Any = 1.0 - beta
        if gradient is not None:
            share = 1.0 / self.topology.tensor_parallel_size if fragment.replicated else 1.0
            square = sum_of_squares(gradient)
            self._square = self._square + share * square
            if isinstance(square, Tensor):
                weight = torch.where(square.isfinite(), weight, 0.0).float()
                gradient.nan_to_num_(0.0, 0.0, 0.0)
            elif square - square != 0.0:  # infinite or NaN
                gradient = None
        momentum, decay = fragment.momentum(), 1.0 if fragment.name in self._touched else beta
        self._touched.add(fragment.name)
        draw = self._draw(fragment, "momentum", self._micro_batch)
        if self.settings.compile and draw is not None and gradient is not None:
            numbers = onepass.packed(momentum.device, decay, weight)
            onepass.compiled(onepass.fold)(*_rows(fragment, momentum, gradient), numbers, draw.a, draw.b, draw.h)
            return
        for block in self._blocks(fragment):
            old = block.of(momentum)
            new = wide(old)
            tiger.fold_(new, None if gradient is None else wide(block.of(gradient)), decay, weight)
            _store(block, old, new, draw)

    def _take_mean(self, name: str, mean: Tensor) -> None:
        fragment = self._by_name[name]
        draw = self._draw(fragment, "mean")
        for block in self._blocks(fragment):
            _store(block, block.of(fragment.momentum()), block.of(mean), draw)

    def _move(self, fragment: Fragment, rate: Any, decay: float, bad: Any, shrink: bool) -> None:
        if bad is True and not shrink:
            return
        if isinstance(bad, Tensor):
            rate = torch.where(bad, 0.0, rate)
        draw = self._draw(fragment, "weight")
        if self.settings.compile and draw is not None and not shrink:
            device, by_row = fragment.values.device, isinstance(rate, Tensor) and rate.ndim == 1
            rates = (rate.float() if by_row else onepass.packed(device, rate))[:, None]
            state = _rows(fragment, fragment.values, fragment.momentum())
            onepass.compiled(onepass.move)(*state, rates, onepass.packed(device, decay)[0], draw.a, draw.b, draw.h)
            return
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

    def _draw(self, fragment: Fragment, *purpose: int | str) -> rounding.Draw | None:
        """The random bits of one rounding of a fragment; None where nothing is rounded stochastically."""
        if fragment.values.dtype != torch.bfloat16 or self.settings.rounding == "nearest":
            return None
        key = rounding.key(self.seed, self.steps_done, fragment.name, *purpose)
        start = fragment.slice_start
        row, column = (0, start[0]) if len(start) == 1 else (start[0], start[1])
        rows = fragment.values.numel() // fragment.width
        return rounding.Draw(key, row, column, rows, fragment.width, fragment.values.device)


def _rows(fragment: Fragment, *flat: Tensor) -> list[Tensor]:
    return [x.view(-1, fragment.width) for x in flat]


def _store(block: Block, old: Tensor, new: Tensor, draw: rounding.Draw | None) -> None:
    """Write numbers back into a block that may be bfloat16; they may be destroyed."""
    if draw is not None:
        draw.round_(old, new, block.row, block.column)
    elif old.data_ptr() != new.data_ptr():
        old.copy_(new)
