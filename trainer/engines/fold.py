"""Training without gradients: each is folded into the optimizer's states as soon as the backward has made it, and freed.

Tiger's momentum is linear in the gradient, so the mean over micro-batches and ranks can be taken in the momentum itself
(Su 2021, kexue.fm/archives/8634); so can that of any rule whose states are (UpdateRule.why_not_folded). With Tiger the training
state is the weights and the momentum: 4 bytes per parameter in bfloat16, both rounded stochastically, or 8 in float32. The
states are sent once per step.

What needs the whole mean gradient is impossible here: clipping by the global norm (Tiger's sign bounds each step by itself),
Lion, AdamW. trainer/optimizers/check.py refuses them.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from model.decoder import Decoder
from model.parallel.mesh import Mesh
from model.parameters import tensors_of
from trainer.checkpoint.rectangles import Shard
from trainer.engines.base import (
    NO_HOOKS,
    MicroBatch,
    StepHooks,
    TrainingState,
    count_targets,
    held_bytes,
    make_shards,
    network_specs,
    on_device,
)
from trainer.engines.buckets import Buckets
from trainer.optimizers import fused, rounding
from trainer.optimizers.config import OptimizerConfig
from trainer.optimizers.expert_balance import ExpertBalance, StepLoads
from trainer.optimizers.fragments import Fragment, FragmentBlock, view, whole_fragments
from trainer.optimizers.norms import at_least_float32, sum_of_squares
from trainer.optimizers.qk_clip import QKClip, StepLogits
from trainer.optimizers.rates import Rates, UpdateStep, one_where, rate_in, zero_where
from trainer.optimizers.rule import Block, apply_, fresh
from trainer.optimizers.step import Optimizer, UpdateResult, seen_rows

_NoiseByName = dict[str, rounding.SliceNoise | None]
"""The random bits for one rounding of every fragment."""


class Fold:
    """The engine that accumulates gradients in the optimizer's states.

    Args:
        model: the decoder, initialised, on its device; its parameters carry `spec` and are trained in their dtype.
        settings: rules that can be folded, without clipping.
        mesh: where this rank stands.
        seed: of the rounding.
        rms_floor: least RMS that scales Tiger's rate of a parameter, by its name.
        bucket_numbers: elements sent in one collective.
        hooks: `before_state_changes` is called before the first backward of a step. `leave` is not: after it the momentum
            holds part of an unfinished step.
    """

    def __init__(
        self, model: Decoder, settings: OptimizerConfig, mesh: Mesh, *,
        seed: int, rms_floor: Mapping[str, float], bucket_numbers: int, hooks: StepHooks = NO_HOOKS,
    ):  # fmt: skip
        self.model, self.settings, self.mesh, self.hooks = model, settings, mesh, hooks
        self.description, self.seed, self.steps_done = "fold", seed, 0
        self._fragments = whole_fragments(model.owned_parameters(), mesh)
        self.optimizer = Optimizer(
            settings, self._fragments, mesh, rms_floor, partitioned=False,
            bucket_elements=bucket_numbers, network=network_specs(model, mesh),
        )  # fmt: skip
        self._by_name = {fragment.name: fragment for fragment in self._fragments}
        self._micro_batches = 0
        """Of the step."""
        self._folds: Counter[str] = Counter()
        """Gradients that each parameter has taken in the step."""
        self._gradient_square: Any = 0.0
        self._rounded = settings.rounding != "nearest" and self._fragments[0].values.dtype == torch.bfloat16
        self._compiled = bool(settings.compile) and self._rounded
        bounds = [_bounds(fragment) for fragment in self._fragments]
        self._noise_generator = rounding.NoiseGenerator(bounds, mesh.device, self._compiled) if self._rounded else None
        self._fold_noise: dict[str, _NoiseByName] = {}
        self._mean_noise: dict[str, _NoiseByName] = {}
        """Of each state that is rounded in this step."""
        self._row_buffers = _RowBuffers(self._fragments, mesh, self._square_share) if self._compiled else None
        self._seen_V: Tensor | None = None
        self._clip, self._logits = QKClip(model, settings.qk_clip, mesh), StepLogits()
        self._balance, self._loads = ExpertBalance(model, mesh), StepLoads()
        rule = self.optimizer.rule
        self._states = list(dict.fromkeys(state for f in self._fragments for state in rule(f).element_states()))
        """Names of all states of granularity element, whose means over replicas are taken."""
        self._buckets = {
            kind: Buckets(self._state_sizes(kind), mesh.replicas_of(kind), bucket_numbers, self._store_mean)
            for kind in self._kinds
        }
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._hook(name, parameter))
            for name, parameter in model.owned_parameters().items()
        ]

    def accumulate(self, batches: Sequence[MicroBatch]) -> Tensor:
        """Forward and backward of every micro-batch of one update; see Engine. Afterwards the states are complete."""
        mesh = self.mesh
        count = count_targets(batches, mesh)
        self._clip.begin()
        self._balance.begin()
        self._begin_step(len(batches))
        self.model.set_loss_scale(mesh.replicas.size / count)
        # States are averaged over replicas, so each rank's share of the mean counts that many times.
        total = self._pass_all(batches, mesh.replicas.size / count)
        for fragment in self._fragments:
            if not self._folds[fragment.name]:
                self._fold(fragment, None)
            self._send(fragment)
        for buckets in self._buckets.values():
            buckets.finish()
        self._fold_noise = self._mean_noise = {}
        if self._row_buffers is not None:
            self._gradient_square = self._gradient_square + self._row_buffers.total()
        self._gradient_square = self._gradient_square * len(batches) / mesh.replicas.size
        if self.optimizer.needs_seen_rows:
            self._seen_V = seen_rows([batch.inputs_BS for batch in batches], self._embedding_rows(), mesh)
        self._logits, self._loads = self._clip.finish(), self._balance.finish()
        return mesh.pipeline.sum(mesh.replicas.sum(total)) / count

    def _pass_all(self, batches: Sequence[MicroBatch], scale: Tensor) -> Tensor:
        """Forward and backward of every micro-batch, of the losses times `scale`; this rank's sum of the losses, 0-dim."""
        total = torch.zeros((), device=self.mesh.device)
        for index, batch in enumerate(batches):
            inputs, targets, boundaries = on_device(batch, self.mesh.device)
            loss_sum, _ = self.model(inputs, targets, cu_seqlens=boundaries)
            self.hooks.mark("forward")
            self._begin_backward(index)
            (loss_sum * scale).backward()
            self.hooks.mark("backward")
            total += loss_sum.detach()
        return total

    @torch.no_grad()
    def update(self, learning_rate: float, skip: bool = False) -> UpdateResult:
        """Move the weights along the directions of their rules; see Engine.

        `skip` leaves the weights alone, but the states have taken the gradients already. `grad_norm` is the root mean
        square of the norms of the micro-batch gradients: that of the mean gradient if there is one micro-batch on one
        rank, above it otherwise.
        """
        self.steps_done += 1
        measured = self.optimizer.measure(self._gradient_square)
        measured = measured.joined(self.optimizer.measure_states())
        step = UpdateStep(self.steps_done, learning_rate, self._seen_V, self._logits.row_factors)
        rates = self.optimizer.rates(step, measured)
        bad: Any = ~torch.isfinite(measured.gradient_norm) | skip
        result = UpdateResult(grad_norm=measured.gradient_norm.float(), skipped=bad)
        if bad.device.type == "cpu":
            bad = bool(bad)
        noise = self._noise("weight")
        compiled = [fragment for fragment in self._fragments if self._compiles(fragment)]
        by_kernel = {*map(id, compiled)}
        if bad is not True:
            self._move_compiled(compiled, rates, bad, noise)
            self._move_whole(rates, bad, noise)
        for fragment in self._fragments:
            self.optimizer.renew_rows(fragment, rates, measured, bad)
            if id(fragment) not in by_kernel and not self.optimizer.rule(fragment).whole:
                self._move(fragment, rates, bad, noise[fragment.name])
            if not skip:
                self._recover(fragment, bad, noise[fragment.name])
        if bad is not True:
            self._scale_rows(step.row_factors, bad)
        self._balance.update(self._loads, result.skipped)
        return result.with_logits(self._logits).with_loads(self._loads)

    def fragments(self) -> list[Fragment]:
        """Every parameter's slice on this tensor-parallel rank, alike on all replicas."""
        return self._fragments

    def shards(self) -> list[Shard]:
        """Weights and optimizer states by name."""
        return make_shards(self._fragments, self.mesh, partitioned=False) + self._balance.shards()

    def training_state(self) -> TrainingState:
        """The network's weights, which are the shards' too, and the optimizer's states."""
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
        return next(spec.rows for spec in network_specs(self.model, self.mesh).values() if spec.kind == "embedding")

    @property
    def _kinds(self) -> tuple[str, ...]:
        """Kinds of parameters that different ranks have copies of."""
        return ("matrix", "expert") if self.mesh.experts.size > 1 else ("matrix",)

    def _kind(self, fragment: Fragment) -> str:
        return "expert" if fragment.kind == "expert" and self.mesh.experts.size > 1 else "matrix"

    def _state_sizes(self, kind: str) -> dict[tuple[str, str], int]:
        rule, fragments = self.optimizer.rule, [f for f in reversed(self._fragments) if self._kind(f) == kind]
        return {(state, f.name): f.values.numel() for f in fragments for state in rule(f).element_states()}

    def _hook(self, name: str, parameter: nn.Parameter) -> Any:
        fragments = [self._by_name[tensor.name] for tensor in tensors_of(name, parameter)]

        def fold(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            if (ranks := self.mesh.experts.size) > 1 and fragments[0].kind == "expert":
                gradient = gradient / ranks  # it is of the tokens of all of these ranks, and counts as one rank's
            parts = gradient.reshape(-1).split(gradient.numel() // len(fragments))
            for fragment, part in zip(fragments, parts, strict=True):
                self._fold(fragment, part)
                if self._is_complete(fragment):
                    self._send(fragment)

        return fold

    def _is_complete(self, fragment: Fragment) -> bool:
        """Whether the states of a fragment have taken all gradients of the step."""
        return self._folds[fragment.name] == self._micro_batches

    def _send(self, fragment: Fragment) -> None:
        """Average the complete states over replicas."""
        for state in self.optimizer.rule(fragment).element_states():
            self._buckets[self._kind(fragment)].done((state, fragment.name), fragment.state[state])

    def _begin_step(self, micro_batches: int) -> None:
        """Reset what is counted per step."""
        self._micro_batches, self._gradient_square = micro_batches, 0.0
        self._folds.clear()
        if self._row_buffers is not None:
            self._row_buffers.squares.zero_()

    def _begin_backward(self, index: int) -> None:
        """Before the backward of a micro-batch: draw the noise of its rounding."""
        if not self._folds:
            self.hooks.before_state_changes()
        self._fold_noise = {state: self._noise(state, index) for state in self._states}

    @torch.no_grad()
    def _fold(self, fragment: Fragment, gradient: Tensor | None, counts: bool = True) -> None:
        """Add a micro-batch's gradient to the states, which decay once per step, and to the norm unless that counts it
        elsewhere. NaN and infinite elements add nothing."""
        rule, first = self.optimizer.rule(fragment), not self._folds[fragment.name]
        self._folds[fragment.name] += 1
        scalars, names = rule.scalars(self.steps_done + 1, decays=first), rule.element_states()
        noise = [self._fold_noise[state][fragment.name] for state in names]
        if self._row_buffers is not None and gradient is not None:
            rows, squares = _as_rows(fragment, *(fragment.state[state] for state in names)), self._row_buffers.of(fragment)
            squares = squares if counts else torch.zeros_like(squares)
            fused.compiled_for(fused.fold_kernel, type(rule))(
                rows, *_as_rows(fragment, gradient), squares, self._row_buffers.constants(*scalars.values()),
                [noise_of_state.bits() for noise_of_state in noise if noise_of_state is not None],
            )  # fmt: skip
            return
        if gradient is not None:
            square = self._mask_and_square(gradient)
            share = self._square_share(fragment)
            self._gradient_square = self._gradient_square + (share * square if counts else 0.0)
        for cut in fragment.blocks(flat=False):
            old = {state: cut.of(fragment.state[state]) for state in names}
            new = {state: at_least_float32(block) for state, block in old.items()}
            some = next(iter(new.values()))
            rule.accumulate(new, torch.zeros_like(some) if gradient is None else at_least_float32(cut.of(gradient)), scalars)
            for state, bits in zip(names, noise, strict=True):
                _round_into(cut, old[state], new[state], bits)

    def _square_share(self, fragment: Fragment) -> float:
        """What the squared gradient of a fragment counts in the norm: that of a tensor which many ranks hold less on each of
        them, and that of an expert more, which fewer ranks hold than other weights."""
        share = 1.0 / self.mesh.tensor.size if fragment.replicated else 1.0
        return share * self.mesh.experts.size if fragment.kind == "expert" else share

    def _mask_and_square(self, gradient: Tensor) -> Any:
        """The sum of squares of a flat gradient, whose NaN and infinite elements become 0 after it."""
        square = sum_of_squares(gradient)
        if isinstance(square, Tensor) or square - square != 0.0:  # not known without waiting, or infinite or NaN
            gradient.masked_fill_(~(gradient.abs() < fused.GRADIENT_LIMIT), 0.0)
        return square

    def _store_mean(self, key: tuple[str, str], mean: Tensor) -> None:
        (state, name), fragment = key, self._by_name[key[1]]
        if state not in self._mean_noise:
            index = self._states.index(state)
            self._mean_noise[state] = self._noise("mean", *([index] if index else []))
        noise = self._mean_noise[state][name]
        if self._row_buffers is not None:
            assert noise is not None
            fused.compiled(fused.store_mean)(*_as_rows(fragment, fragment.state[state], mean), noise.bits())
            return
        for cut in fragment.blocks(flat=False):
            _round_into(cut, cut.of(fragment.state[state]), cut.of(mean), noise)

    def _compiles(self, fragment: Fragment) -> bool:
        rule = self.optimizer.rule(fragment)
        return self._compiled and not rule.whole and not rule.by_row(fragment.kind)

    def _move_compiled(self, fragments: list[Fragment], rates: Rates, bad: Any, noise: "_NoiseByName") -> None:
        """One compiled pass per weight; the rates of all are computed together."""
        if self._row_buffers is None or not fragments:
            return
        uniform = [fragment for fragment in fragments if not rates.by_row(fragment)]
        rate_F, decays = rates.together(uniform)
        aligned = nn.functional.pad(zero_where(bad, rate_F)[:, None], (0, 3)).split(1)  # 16 bytes apart, as kernels need
        by_name = {f.name: (rate[:, :1], decay) for f, rate, decay in zip(uniform, aligned, decays, strict=True)}
        for fragment in fragments:
            if fragment.name not in by_name:
                rate, decay = rates.of(fragment)
                by_name[fragment.name] = zero_where(bad, rate).float()[:, None], decay
        constants = self._row_buffers.constants
        for fragment in fragments:
            (rate, decay), own, rule = by_name[fragment.name], noise[fragment.name], self.optimizer.rule(fragment)
            assert own is not None
            values, *states = _as_rows(fragment, fragment.values, *(fragment.state[s] for s in rule.element_states()))
            fused.compiled_for(fused.move_kernel, type(rule))(
                values, states, rate, constants(decay)[0], constants(*rule.scalars(self.steps_done).values()), own.bits()
            )  # fmt: skip

    def _move_whole(self, rates: Rates, bad: Any, noise: "_NoiseByName") -> None:
        """Weights whose directions are of whole matrices."""
        for fragment, direction in self.optimizer.whole_directions(self.steps_done):
            rate, decay = rates.of(fragment)
            for cut in fragment.blocks(flat=False):
                old = cut.of(fragment.values)
                new = at_least_float32(old)
                apply_(new, cut.of(direction), zero_where(bad, rate), decay)
                _round_into(cut, old, new, noise[fragment.name])

    def _move(self, fragment: Fragment, rates: Rates, bad: Any, noise: rounding.SliceNoise | None) -> None:
        """The same for one weight, operation by operation."""
        if bad is True:
            return
        rule, (rate, decay) = self.optimizer.rule(fragment), rates.of(fragment)
        scalars, measured = rule.scalars(self.steps_done), rates.measured.of(fragment.name, torch.float32)
        for cut in fragment.blocks(flat=False):
            block = view(fragment, cut, measured)
            old, new = block.values, at_least_float32(block.values)
            state = {name: at_least_float32(part) for name, part in block.state.items()}
            direction = fresh(rule.direction(Block(new, block.gradient, state, block.measured), scalars), state)
            apply_(new, direction, rate_in(cut, zero_where(bad, rate), new.dtype), decay)
            _round_into(cut, old, new, noise)

    def _scale_rows(self, factors: Mapping[str, Tensor], bad: Any) -> None:
        """Multiply rows of weights once these have moved. What a factor of 1 leaves exact, no rounding changes."""
        noise = self._noise("qk clip") if factors else {}
        for name, own in factors.items():
            fragment = self._by_name[name]
            own = one_where(bad, own)
            for cut in fragment.blocks(flat=False):
                old = cut.of(fragment.values)
                new = at_least_float32(old)
                _round_into(cut, old, new.mul_(fragment.factors_in(cut, own).to(new.dtype)), noise[name])

    def _recover(self, fragment: Fragment, bad: Any, noise: rounding.SliceNoise | None) -> None:
        """What the rule does to a weight in a step whose gradient is not finite."""
        if bad is False or not self.optimizer.rule(fragment).recovers:
            return
        for cut in fragment.blocks(flat=False):
            old = cut.of(fragment.values)
            new = at_least_float32(old)
            self.optimizer.rule(fragment).recover(new, fragment.centre, bad)
            _round_into(cut, old, new, noise)

    def _noise(self, *purpose: int | str) -> "_NoiseByName":
        """The random bits for one rounding of every fragment, by name; None where nothing is rounded stochastically."""
        if self._noise_generator is None:
            return dict.fromkeys(self._by_name)
        keys = [rounding.noise_key(self.seed, self.steps_done, name, *purpose) for name in self._by_name]
        return dict(zip(self._by_name, self._noise_generator.draw(keys), strict=True))


MOST_CONSTANTS = 256


class _RowBuffers:
    """What the compiled passes need beside the tensors, for all fragments: one sum of squares per row, and constants."""

    def __init__(self, fragments: Sequence[Fragment], mesh: Mesh, share: Callable[[Fragment], float]):
        rows = [rounding.aligned(_bounds(fragment).rows) for fragment in fragments]
        self._device, self._constants = mesh.device, {}
        self.squares = torch.zeros(sum(rows), 1, device=mesh.device)
        """Sums of squares of the gradients' rows."""
        parts = self.squares.split(rows)
        self._parts = {f.name: part[: _bounds(f).rows] for f, part in zip(fragments, parts, strict=True)}
        size = mesh.tensor.size
        shares = torch.tensor([share(fragment) for fragment in fragments], dtype=torch.float64)
        self._shares = (
            shares.repeat_interleave(torch.tensor(rows)).to(mesh.device) if size > 1 or mesh.experts.size > 1 else None
        )

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
            if len(self._constants) > MOST_CONSTANTS:  # scalars that follow the number of the update
                self._constants.clear()
            self._constants[values] = fused.to_device(values, self._device)
        return self._constants[values]


def _bounds(fragment: Fragment) -> rounding.SliceBounds:
    start = fragment.slice_start
    row, column = (0, start[0]) if len(start) == 1 else (start[0], start[1])
    return rounding.SliceBounds(row, column, fragment.values.numel() // fragment.width, fragment.width)


def _as_rows(fragment: Fragment, *flat: Tensor) -> list[Tensor]:
    return [x.view(-1, fragment.width) for x in flat]


def _round_into(block: FragmentBlock, old: Tensor, new: Tensor, noise: rounding.SliceNoise | None) -> None:
    """Write a block back: `new` (destroyed) into `old`, which may be bfloat16."""
    if noise is not None:
        noise.round_(old, new, block.row, block.column)
    elif old.data_ptr() != new.data_ptr():
        old.copy_(new)
