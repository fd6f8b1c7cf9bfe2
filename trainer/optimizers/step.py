"""One update of this rank's fragments by the rules of their parameters: clipping, and gradients that are not finite.

The rules themselves are in trainer/optimizers/tiger.py, lion.py, adamw.py and muon.py, their rates in rates.py.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from model.parallel.mesh import Mesh
from model.parameters import ParameterSpec
from trainer.optimizers import fused
from trainer.optimizers.config import OptimizerConfig
from trainer.optimizers.expert_balance import NO_LOADS, StepLoads
from trainer.optimizers.fragments import Fragment, view
from trainer.optimizers.norms import Key, Measured, at_least_float32, measure
from trainer.optimizers.qk_clip import StepLogits
from trainer.optimizers.rates import Rates, UpdateStep, one_where, rate_in, zero_where
from trainer.optimizers.rule import RuleStep, RuleTensors, UpdateRule, apply_, fresh
from trainer.optimizers.whole import WholeMatrices


@dataclass(frozen=True)
class UpdateResult:
    """What an update did: 0-dim tensors on the device, to be read when they are logged."""

    grad_norm: Tensor
    """Global L2 norm before clipping."""
    skipped: Tensor
    """bool: a gradient was NaN or infinite, and no weight took a step."""
    logit_bound: Tensor | None = None
    """With optimizer.qk_clip: of the logits of all heads and layers before the update."""
    heads_clipped: Tensor | None = None
    loads: StepLoads = NO_LOADS
    """In a network with experts."""

    def logit_record(self) -> dict[str, Tensor]:
        """For the record of the step; nothing without optimizer.qk_clip."""
        values = {"logit_bound": self.logit_bound, "heads_clipped": self.heads_clipped}
        return {key: value for key, value in values.items() if value is not None}

    def with_loads(self, loads: StepLoads) -> "UpdateResult":
        """The same after passes with these loads."""
        return replace(self, loads=loads)

    def with_logits(self, logits: StepLogits) -> "UpdateResult":
        """The same after forward passes with these logits."""
        if logits.largest is None or logits.heads_above is None:
            return self
        clipped = torch.where(self.skipped.to(logits.heads_above.device), 0, logits.heads_above)
        return replace(self, logit_bound=logits.largest, heads_clipped=clipped)


class Optimizer:
    """The rules of this rank's fragments, and their states.

    All ranks make it and call it alike. A NaN or infinite gradient on any rank makes all gradients count as zero on all ranks:
    states decay, once, and the weights stay, or shrink with `optimizer.tiger.non_finite = "shrink"`.

    Args:
        fragments: what this rank holds; one may be empty, none may be missing.
        rms_floor: least statistic that scales the rate of a parameter, by its name (model/initialization.py, rms_floors).
        partitioned: True under ZeRO, whose replicas hold different parts.
        bucket_elements: elements of whole matrices that a rank exchanges at once.
        network: all parameters by name, where other ranks have other layers; default: those of the fragments.
    """

    def __init__(
        self, settings: OptimizerConfig, fragments: list[Fragment], mesh: Mesh,
        rms_floor: Mapping[str, float], partitioned: bool, bucket_elements: int = 50_000_000,
        network: Mapping[str, ParameterSpec] | None = None,
    ):  # fmt: skip
        self.settings, self.fragments, self.mesh, self.rms_floor = settings, fragments, mesh, rms_floor
        self.partitioned = partitioned
        own: Any = {f.name: ParameterSpec(f.kind, f.shape, None, padding=f.padding) for f in fragments}  # type: ignore[arg-type]
        parameters: Mapping[str, ParameterSpec] = network or own
        self.assigned = {name: settings.assigned(name, spec.kind) for name, spec in parameters.items()}
        """The rule of each parameter, those of other ranks' stages among them."""
        for fragment in fragments:
            fragment.allocate(self.rule(fragment).states)
        whole = [fragment for fragment in fragments if self.rule(fragment).whole]
        self._whole = WholeMatrices(whole, self.rule, mesh, bucket_elements) if whole else None
        self._wanted_first, self._wanted_of_states = (self._wanted(parameters, of_states) for of_states in (False, True))

    @property
    def needs_seen_rows(self) -> bool:
        """Whether an update must know which rows of the embedding occurred (`seen_rows`)."""
        return any(assigned.rows == "seen" for assigned in self.assigned.values())

    def rule(self, fragment: Fragment) -> UpdateRule:
        """The rule of a fragment's parameter."""
        return self.assigned[fragment.name].rule

    def update(self, step: UpdateStep) -> UpdateResult:
        """Move every weight once along the gradients of the mean loss in the fragments."""
        measured = self.measure()
        norm = measured.gradient_norm
        fine = torch.isfinite(norm)
        bad: Any = ~fine
        scale: Any = torch.where(fine, _clip(norm, self.settings.clipping), 0.0)
        if scale.device.type == "cpu":
            bad, scale = bool(bad), scale.item()
        rates = self.rates(step, measured.with_scaled_gradients(scale))
        _Update(self, rates, scale, bad).run()
        return UpdateResult(grad_norm=norm.float(), skipped=~fine)

    def rates(self, step: UpdateStep, measured: Measured) -> Rates:
        """The rates of an update."""
        return Rates(self.settings.rate, self.assigned, step, measured, self.rms_floor)

    def leave_out(self, number: int) -> None:
        """Step `number` left out before `update`, because of its loss or by DeepSpeed: states of elements decay once.

        As under a gradient that is not finite, with which DeepSpeed itself leaves steps out (docs/optimizers.md lists when).
        """
        for fragment in self.fragments:
            rule, fragment.gradient = self.rule(fragment), None
            for cut in fragment.blocks(flat=True):
                block = view(fragment, cut)
                rule.accumulate(block.state, block.gradient, rule.scalars(number))

    def measure(self, gradient_square: Any = None) -> Measured:
        """What the rules must know before anything changes; all ranks call it. `gradient_square` as in norms.measure."""
        wanted = self._wanted_first
        return measure(self.fragments, self.mesh, wanted, partitioned=self.partitioned, gradient_square=gradient_square)

    def measure_states(self) -> Measured:
        """What the rules must know of states that have taken this step's gradient; all ranks call it."""
        if not self._wanted_of_states:
            return Measured({}, torch.zeros(()))
        wanted = self._wanted_of_states
        return measure(self.fragments, self.mesh, wanted, partitioned=self.partitioned, gradient_square=0.0)

    def _wanted(self, parameters: Mapping[str, ParameterSpec], of_states: bool) -> dict[Key, int]:
        """What the rules measure, of states or of what is known before any changes, and how many numbers each is."""
        rules = {name: assigned.rule for name, assigned in self.assigned.items()}
        return {
            (name, statistic): spec.rows if statistic.over == "row" else 1
            for name, spec in parameters.items()
            for statistic in (rules[name].relative_to(spec.kind), *rules[name].measures(spec.kind))
            if statistic is not None and (statistic.of in rules[name].states) == of_states
        }

    def whole_directions(self, number: int, scale: Any = 1.0) -> Iterator[tuple[Fragment, Tensor]]:
        """The directions, flat and at least float32, of the fragments whose rule has `whole`; all ranks take all of them.

        Args:
            number: of the update.
            scale: factor of the gradients, as for `UpdateRule.scalars`.
        """
        if self._whole is None:
            return
        for fragment, direction in self._whole.directions(lambda fragment: self._collected(fragment, number, scale)):
            wide = direction.to(fragment.values.device, at_least_float32(fragment.values[:0]).dtype)
            yield fragment, wide * self.rule(fragment).whole_scale(*fragment.shape)

    def _collected(self, fragment: Fragment, number: int, scale: Any) -> Tensor:
        """`direction` of a whole fragment, flat."""
        rule, parts = self.rule(fragment), list[Tensor]()
        scalars = rule.scalars(number, scale=scale if rule.takes_scale else 1.0)
        for cut in fragment.blocks(flat=True):
            block = view(fragment, cut)
            state = {name: at_least_float32(part) for name, part in block.state.items()}
            parts.append(rule.direction(block._replace(state=state), scalars).view(-1))
        return torch.cat(parts)

    def renew_rows(self, fragment: Fragment, rates: Rates, measured: Measured, bad: Any) -> None:
        """The states of granularity row and matrix, once per update; in a bad step they stay."""
        rule = self.rule(fragment)
        rows = {name: state for name, state in fragment.state.items() if fragment.granularity[name] != "element"}
        if not rows or bad is True:
            return
        before = {name: state.clone() for name, state in rows.items()} if isinstance(bad, Tensor) else {}
        own = measured.of(fragment.name, next(iter(rows.values())).dtype)
        rule.accumulate_rows(rows, own, rule.scalars(rates.step.number))
        for name, state in before.items():
            rows[name].copy_(torch.where(bad, state, rows[name]))


@dataclass(frozen=True)
class _Update:
    """One update of all fragments."""

    optimizer: Optimizer
    rates: Rates
    scale: Any
    """Factor of the gradients; a 0-dim one is 0 where `bad`."""
    bad: Any
    """bool, or 0-dim bool where the device alone knows: a gradient is not finite."""

    def run(self) -> None:
        """Each fragment by its rule's kernel, by one compiled pass, or operation by operation."""
        optimizer, rule = self.optimizer, self.optimizer.rule
        self._whole([fragment for fragment in optimizer.fragments if rule(fragment).whole])
        by_library = [f for f in optimizer.fragments if rule(f).library_kernel and self._is_flat(f)]
        self._by_library([fragment for fragment in by_library if fragment.values.numel()])
        done = {*map(id, by_library)}
        own = [fragment for fragment in optimizer.fragments if id(fragment) not in done and not rule(fragment).whole]
        self._compiled([fragment for fragment in own if self._compiles(fragment) and fragment.values.numel()])
        own = [fragment for fragment in own if not self._compiles(fragment)]
        twice = [fragment for fragment in own if rule(fragment).measures_of_states(fragment.kind)]
        twice_ids = {*map(id, twice)}
        for fragment in own:
            if id(fragment) in twice_ids:
                self._pass(fragment, self.rates.measured, accumulates=True, applies=False)
            else:
                optimizer.renew_rows(fragment, self.rates, self.rates.measured, self.bad)
                self._pass(fragment, self.rates.measured, accumulates=True, applies=True)
        if twice:
            measured = self.rates.measured.joined(optimizer.measure_states())
            for fragment in twice:
                optimizer.renew_rows(fragment, self.rates, measured, self.bad)
                self._pass(fragment, measured, accumulates=False, applies=True)
        self._scale_rows()

    def _scale_rows(self) -> None:
        """By UpdateStep.row_factors."""
        if self.bad is True:
            return
        for fragment in self.optimizer.fragments:
            if (factors := self.rates.step.row_factors.get(fragment.name)) is not None:
                factors = one_where(self.bad, factors).to(fragment.values)
                for cut in fragment.blocks(flat=False):
                    cut.of(fragment.values).mul_(fragment.factors_in(cut, factors))

    def _whole(self, fragments: list[Fragment]) -> None:
        """The states of all first: other ranks wait for what these become."""
        for fragment in fragments:
            self._pass(fragment, self.rates.measured, accumulates=True, applies=False)
        if self.bad is True:
            return
        for fragment, direction in self.optimizer.whole_directions(self.rates.step.number, self.scale):
            rate, decay = self.rates.of(fragment)
            apply_(fragment.values, direction, zero_where(self.bad, rate), decay)

    def _compiles(self, fragment: Fragment) -> bool:
        return bool(self.optimizer.settings.compile) and self._is_flat(fragment)

    def _by_library(self, fragments: list[Fragment]) -> None:
        """By a library's kernel, those of one rule, rate and decay in one call."""
        groups: dict[Any, list[Fragment]] = {}
        for fragment in fragments:
            groups.setdefault((self.optimizer.rule(fragment), *self.rates.unscaled(fragment)), []).append(fragment)
        scale = self.scale if self.optimizer.settings.clipping else 1.0
        for (rule, rate, decay), group in groups.items():
            gradients = [f.gradient for f in group if f.gradient is not None]
            tensors = RuleTensors([f.values for f in group], gradients, [f.state for f in group])
            rule.update_together(tensors, RuleStep(self.rates.step.number, rate, decay, scale, self.bad))

    def _compiled(self, fragments: list[Fragment]) -> None:
        """By one compiled pass per fragment."""
        if not fragments:
            return
        rules = [self.optimizer.rule(fragment) for fragment in fragments]
        table = fused.scalar_table(rules, self.rates.step.number, self.rates.together(fragments), self.scale, self.bad)
        for fragment, rule, scalars in zip(fragments, rules, table.unbind(), strict=True):
            states = [fragment.state[name] for name in rule.states]
            fused.compiled_for(fused.update_kernel, type(rule))(fragment.values, fragment.gradient, states, scalars)
            rule.recover(fragment.values, fragment.centre, self.bad)

    def _pass(self, fragment: Fragment, measured: Measured, accumulates: bool, applies: bool) -> None:
        """Block by block, so that on a CPU a block stays in the cache."""
        rule, values = self.optimizer.rule(fragment), fragment.values
        scalars = rule.scalars(self.rates.step.number, scale=self.scale if rule.takes_scale else 1.0)
        rate, decay = self.rates.of(fragment)
        rate, flat = zero_where(self.bad, rate), self._is_flat(fragment)
        own = {} if flat else measured.of(fragment.name, values.dtype)
        for cut in fragment.blocks(flat):
            block = view(fragment, cut, own)
            if accumulates:
                self._scale(block.gradient, 1.0 if rule.takes_scale else self.scale)
            if self.bad is True or not applies:
                if accumulates:
                    rule.accumulate(block.state, block.gradient, scalars)
            else:
                direction = (rule.step if accumulates else rule.direction)(block, scalars)
                apply_(block.values, fresh(direction, block.state), rate_in(cut, rate, values.dtype), decay)
            if applies:
                rule.recover(block.values, fragment.centre, self.bad)

    def _is_flat(self, fragment: Fragment) -> bool:
        return not self.rates.by_row(fragment) and not self.optimizer.rule(fragment).by_row(fragment.kind)

    def _scale(self, gradient: Tensor, scale: Any) -> None:
        """Clip a block's gradient in place; a bad one counts as zero."""
        if isinstance(self.bad, Tensor):
            gradient.nan_to_num_(0.0, 0.0, 0.0)  # only the device knows whether it is bad; if so, it is scaled by 0
        elif self.bad:
            gradient.zero_()
        if isinstance(scale, Tensor) or scale != 1.0:
            gradient.mul_(scale)


def _clip(norm: Tensor, limit: float) -> Tensor:
    """Factor of the gradients; 1 without a limit (as torch.nn.utils.clip_grad_norm_)."""
    return (limit / (norm + 1e-6)).clamp(max=1.0) if limit else torch.ones_like(norm)


def seen_rows(ids: Sequence[Tensor], vocabulary: int, mesh: Mesh) -> Tensor:
    """Rows of the embedding whose token occurred in a step: bool [vocabulary], the same on all ranks.

    Taken from the ids of all micro-batches and replicas, not from gradients: those of one micro-batch miss rows,
    and with tied weights every row has one. Tensor-parallel ranks have the same ids.
    """
    seen = torch.zeros(vocabulary, dtype=torch.uint8, device=mesh.device)
    for tokens in ids:
        seen[tokens.reshape(-1).to(mesh.device, non_blocking=True)] = 1
    return mesh.replicas.max(seen).bool()
