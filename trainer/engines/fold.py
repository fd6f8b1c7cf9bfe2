"""Tiger without gradients: each is folded into the momentum as soon as the backward has made it, and freed.

Tiger's momentum is linear in the gradient, so the mean over micro-batches and ranks can be taken in the momentum itself
(Su 2021, kexue.fm/archives/8634). The training state is the weights and the momentum: 4 bytes per parameter in bfloat16, both
rounded stochastically, or 8 in float32. The momentum is sent once per step.

What needs the whole mean gradient is impossible here: clipping by the global norm (Tiger's sign bounds each step by itself),
Lion, AdamW. trainer/optimizers/step.py refuses them.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from model.parallel.mesh import Mesh
from trainer.checkpoint.rectangles import Shard
from trainer.config import OptimizerConfig
from trainer.engines.base import (
    NO_HOOKS,
    MicroBatch,
    StepHooks,
    TrainingState,
    count_targets,
    held_bytes,
    make_shards,
    on_device,
)
from trainer.engines.buckets import Buckets
from trainer.optimizers import fused, rounding, tiger
from trainer.optimizers.fragments import Fragment, FragmentBlock, block_limit, fragment_blocks, whole_fragments
from trainer.optimizers.norms import at_least_float32, sum_of_squares, tensor_norms
from trainer.optimizers.step import (
    Rates,
    UpdateResult,
    UpdateStep,
    allocate,
    has_row_rates,
    names_with_rms,
    rate_in,
    row_mask,
)


class Fold:
    """The engine that accumulates gradients in the momentum.

    Args:
        model: the decoder, initialised, on its device; its parameters carry `spec` and are trained in their dtype.
        settings: Tiger, without clipping.
        mesh: where this rank stands.
        seed: of the rounding.
        rms_floor: least RMS that scales Tiger's rate of a parameter, by its name.
        bucket_numbers: elements sent in one collective.
        hooks: `before_state_changes` is called before the first backward of a step. `leave` is not: after it the momentum
            holds part of an unfinished step.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: OptimizerConfig,
        mesh: Mesh,
        *,
        seed: int,
        rms_floor: Mapping[str, float],
        bucket_numbers: int,
        hooks: StepHooks = NO_HOOKS,
    ):
        self.model, self.settings, self.mesh, self.hooks = model, settings, mesh, hooks
        self.description = "fold"
        self.seed, self.rms_floor, self.steps_done = seed, rms_floor, 0
        self._fragments = whole_fragments(model, mesh)
        allocate(self._fragments, settings)
        self._by_name = {fragment.name: fragment for fragment in self._fragments}
        self._last_micro_batch = False
        self._folded: set[str] = set()
        self._gradient_square: Any = 0.0
        self._rounded = settings.rounding != "nearest" and self._fragments[0].values.dtype == torch.bfloat16
        self._compiled = bool(settings.compile) and self._rounded
        bounds = [_bounds(fragment) for fragment in self._fragments]
        self._noise_generator = rounding.NoiseGenerator(bounds, mesh.device, self._compiled) if self._rounded else None
        self._fold_noise: dict[str, rounding.SliceNoise | None] = {}
        self._mean_noise: dict[str, rounding.SliceNoise | None] = {}
        self._row_buffers = _RowBuffers(self._fragments, mesh) if self._compiled else None
        self._seen_V: Tensor | None = None
        backwards = {fragment.name: fragment.momentum() for fragment in reversed(self._fragments)}
        self._buckets = Buckets(backwards, mesh.replicas, bucket_numbers, self._store_mean)
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._hook(self._by_name[name]))
            for name, parameter in model.named_parameters()
        ]

    def accumulate(self, batches: Sequence[MicroBatch]) -> Tensor:
        """Forward and backward of every micro-batch of one update; see Engine. Afterwards the momentum is complete."""
        mesh = self.mesh
        count = count_targets(batches, mesh)
        total = torch.zeros((), device=mesh.device)
        for index, batch in enumerate(batches):
            self._begin_micro_batch(index, last=index + 1 == len(batches))
            inputs, targets, boundaries = on_device(batch, mesh.device)
            loss_sum, _ = self.model(inputs, targets, cu_seqlens=boundaries)
            self.hooks.mark("forward")
            if index == 0:
                self.hooks.before_state_changes()
            # Momenta are averaged over replicas, so each rank's share of the mean counts that many times.
            (loss_sum * (mesh.replicas.size / count)).backward()
            self.hooks.mark("backward")
            total += loss_sum.detach()
        for fragment in self._fragments:
            if fragment.name not in self._folded:
                self._fold(fragment, None)
        self._buckets.finish()
        self._fold_noise = self._mean_noise = {}
        if self._row_buffers is not None:
            self._gradient_square = self._gradient_square + self._row_buffers.total()
        self._gradient_square = self._gradient_square * len(batches) / mesh.replicas.size
        if self.settings.embedding == "lazy":
            self._seen_V = row_mask([batch.inputs_BS for batch in batches], self._embedding_rows(), mesh)
        return mesh.replicas.sum(total) / count

    @torch.no_grad()
    def update(self, learning_rate: float, skip: bool = False) -> UpdateResult:
        """Move the weights along the sign of the momentum; see Engine.

        `skip` leaves the weights alone, but the momentum has taken the gradients already. `grad_norm` is the root mean
        square of the norms of the micro-batch gradients: that of the mean gradient if there is one micro-batch on one
        rank, above it otherwise.
        """
        self.steps_done += 1
        rms_of, row_rms_of = names_with_rms(self._fragments, self.settings)
        norms = tensor_norms(
            self._fragments, self.mesh, rms_of=rms_of, row_rms_of=row_rms_of, partitioned=False,
            gradient_square=self._gradient_square,
        )  # fmt: skip
        rates = Rates(self.settings, UpdateStep(self.steps_done, learning_rate, self._seen_V), norms, self.rms_floor)
        bad: Any = ~torch.isfinite(norms.gradient_norm) | skip
        skipped = bad
        if bad.device.type == "cpu":
            bad = bool(bad)
        shrink, noise = self.settings.non_finite == "shrink" and not skip, self._noise("weight")
        if self._compiled and not shrink:
            self._compiled_update(rates, bad, noise)
            return UpdateResult(grad_norm=norms.gradient_norm.float(), skipped=skipped)
        for fragment in self._fragments:
            self._update_fragment(fragment, rates.of(fragment), bad, shrink, noise[fragment.name])
        return UpdateResult(grad_norm=norms.gradient_norm.float(), skipped=skipped)

    def fragments(self) -> list[Fragment]:
        """Every parameter's slice on this tensor-parallel rank, alike on all replicas."""
        return self._fragments

    def shards(self) -> list[Shard]:
        """Weights and momentum by name."""
        mesh = self.mesh
        replicas, tensor = mesh.replicas, mesh.tensor
        shared = (replicas.rank * tensor.size + tensor.rank, replicas.size * tensor.size)
        split = (replicas.rank, replicas.size)
        return make_shards(self._fragments, split=split, replicated=shared, state_changes_in="accumulate")

    def training_state(self) -> TrainingState:
        """The network's weights, which are the shards' too, and the momentum."""
        shards = self.shards()
        weights = held_bytes([shard for shard in shards if shard.name.startswith("weight/")])
        return TrainingState(weights, held_bytes(shards) - weights, "optimizer state")

    def loaded(self, step: int) -> None:
        """Set the counter of the rounding; the shards are the network's own weights."""
        self.steps_done = step

    def close(self) -> None:
        """Remove the hooks from the model."""
        for hook in self._hooks:
            hook.remove()

    def _embedding_rows(self) -> int:
        return next(fragment.shape[0] for fragment in self._fragments if fragment.kind == "embedding")

    def _hook(self, fragment: Fragment) -> Any:
        def fold(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            self._fold(fragment, gradient.reshape(-1))
            if self._last_micro_batch:
                self._buckets.done(fragment.name)

        return fold

    def _begin_micro_batch(self, index: int, last: bool) -> None:
        """Before the backward of a micro-batch: reset what is counted per step, and draw the noise of its rounding."""
        self._last_micro_batch = last
        if index == 0:
            self._folded.clear()
            self._gradient_square = 0.0
            if self._row_buffers is not None:
                self._row_buffers.squares.zero_()
        self._fold_noise = self._noise("momentum", index)

    @torch.no_grad()
    def _fold(self, fragment: Fragment, gradient: Tensor | None) -> None:
        """Add a micro-batch's gradient to the momentum, which decays once per step. NaN and infinite elements add nothing."""
        beta = self.settings.coefficients[0]
        momentum, decay = fragment.momentum(), 1.0 if fragment.name in self._folded else beta
        self._folded.add(fragment.name)
        noise = self._fold_noise[fragment.name]
        if self._row_buffers is not None and gradient is not None:
            assert noise is not None
            scalars, squares = self._row_buffers.constants(decay, 1.0 - beta), self._row_buffers.of(fragment)
            rows = _as_rows(fragment, momentum, gradient)
            fused.compiled(fused.fold_gradient)(*rows, squares, scalars, noise.a, noise.b, noise.h)
            return
        if gradient is not None:
            share = 1.0 / self.mesh.tensor.size if fragment.replicated else 1.0
            square = sum_of_squares(gradient)
            self._gradient_square = self._gradient_square + share * square
            if isinstance(square, Tensor) or square - square != 0.0:  # not known without waiting, or infinite or NaN
                gradient.masked_fill_(~(gradient.abs() < fused.GRADIENT_LIMIT), 0.0)
        for block in self._blocks(fragment):
            old = block.of(momentum)
            new = at_least_float32(old)
            tiger.accumulate_(new, None if gradient is None else at_least_float32(block.of(gradient)), decay, 1.0 - beta)
            _round_into(block, old, new, noise)

    def _store_mean(self, name: str, mean: Tensor) -> None:
        fragment = self._by_name[name]
        if not self._mean_noise:
            self._mean_noise = self._noise("mean")
        noise = self._mean_noise[name]
        if self._row_buffers is not None:
            assert noise is not None
            fused.compiled(fused.store_mean)(*_as_rows(fragment, fragment.momentum(), mean), noise.a, noise.b, noise.h)
            return
        for block in self._blocks(fragment):
            _round_into(block, block.of(fragment.momentum()), block.of(mean), noise)

    def _compiled_update(self, rates: Rates, bad: Any, noise: Mapping[str, rounding.SliceNoise | None]) -> None:
        """One compiled pass per weight; the rates of all are computed together."""
        if bad is True:
            return
        assert self._row_buffers is not None
        uniform = [fragment for fragment in self._fragments if not has_row_rates(fragment, self.settings)]
        rate_F, decays = rates.together(uniform)
        aligned = nn.functional.pad(_zero_where(bad, rate_F)[:, None], (0, 3)).split(
            1
        )  # 16 bytes apart, as compiled kernels need
        by_name = {f.name: (rate[:, :1], decay) for f, rate, decay in zip(uniform, aligned, decays, strict=True)}
        for fragment in self._fragments:
            if fragment.name not in by_name:
                rate, decay = rates.of(fragment)
                by_name[fragment.name] = _zero_where(bad, rate).float()[:, None], decay
        for fragment in self._fragments:
            (rate, decay), own = by_name[fragment.name], noise[fragment.name]
            assert own is not None
            rows = _as_rows(fragment, fragment.values, fragment.momentum())
            fused.compiled(fused.update_values)(*rows, rate, self._row_buffers.constants(decay)[0], own.a, own.b, own.h)

    def _update_fragment(
        self, fragment: Fragment, rate_and_decay: tuple[Any, float], bad: Any, shrink: bool, noise: rounding.SliceNoise | None
    ) -> None:
        if bad is True and not shrink:
            return
        rate, decay = _zero_where(bad, rate_and_decay[0]), rate_and_decay[1]
        for block in self._blocks(fragment):
            old = block.of(fragment.values)
            new = at_least_float32(old)
            if bad is not True:
                tiger.apply_sign_(new, at_least_float32(block.of(fragment.momentum())), rate_in(block, rate, new.dtype), decay)
            if shrink:
                tiger.shrink_(new, fragment.kind, bad)
            _round_into(block, old, new, noise)

    def _blocks(self, fragment: Fragment) -> Iterator[FragmentBlock]:
        return fragment_blocks(0, fragment.values.numel(), fragment.width, block_limit(fragment.values.device))

    def _noise(self, *purpose: int | str) -> dict[str, rounding.SliceNoise | None]:
        """The random bits for one rounding of every fragment, by name; None where nothing is rounded stochastically."""
        if self._noise_generator is None:
            return dict.fromkeys(self._by_name)
        keys = [rounding.noise_key(self.seed, self.steps_done, name, *purpose) for name in self._by_name]
        return dict(zip(self._by_name, self._noise_generator.draw(keys), strict=True))


class _RowBuffers:
    """What the compiled passes need beside the tensors, for all fragments: one sum of squares per row, and constants."""

    def __init__(self, fragments: Sequence[Fragment], mesh: Mesh):
        rows = [rounding.aligned(_bounds(fragment).rows) for fragment in fragments]
        self._device, self._constants = mesh.device, {}
        self.squares = torch.zeros(sum(rows), 1, device=mesh.device)
        """Sums of squares of the gradients' rows."""
        parts = self.squares.split(rows)
        self._parts = {f.name: part[: _bounds(f).rows] for f, part in zip(fragments, parts, strict=True)}
        size = mesh.tensor.size
        shares = torch.tensor([1.0 / size if fragment.replicated else 1.0 for fragment in fragments], dtype=torch.float64)
        self._shares = shares.repeat_interleave(torch.tensor(rows)).to(mesh.device) if size > 1 else None

    def of(self, fragment: Fragment) -> Tensor:
        """The rows of `squares` that belong to a fragment."""
        return self._parts[fragment.name]

    def total(self) -> Tensor:
        """Sum over all rows, 0-dim float64; rows that n tensor-parallel ranks share count 1/n."""
        wide = self.squares[:, 0].double()
        return wide.sum() if self._shares is None else wide @ self._shares

    def constants(self, *values: float) -> Tensor:
        """Floats of the host as a tensor on the device, sent there once."""
        if values not in self._constants:
            self._constants[values] = fused.to_device(values, self._device)
        return self._constants[values]


def _bounds(fragment: Fragment) -> rounding.SliceBounds:
    start = fragment.slice_start
    row, column = (0, start[0]) if len(start) == 1 else (start[0], start[1])
    return rounding.SliceBounds(row, column, fragment.values.numel() // fragment.width, fragment.width)


def _zero_where(bad: Any, rate: Any) -> Any:
    """A rate of 0 if the update is left out."""
    return torch.where(bad, 0.0, rate) if isinstance(bad, Tensor) else rate


def _as_rows(fragment: Fragment, *flat: Tensor) -> list[Tensor]:
    return [x.view(-1, fragment.width) for x in flat]


def _round_into(block: FragmentBlock, old: Tensor, new: Tensor, noise: rounding.SliceNoise | None) -> None:
    """Write a block back: `new` (destroyed) into `old`, which may be bfloat16."""
    if noise is not None:
        noise.round_(old, new, block.row, block.column)
    elif old.data_ptr() != new.data_ptr():
        old.copy_(new)
