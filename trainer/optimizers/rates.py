"""Learning rates and weight decays of all parameters in one update."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trainer.optimizers.config import AssignedRule
from trainer.optimizers.fragments import Fragment, FragmentBlock
from trainer.optimizers.fused import to_device
from trainer.optimizers.norms import Measured


@dataclass(frozen=True)
class UpdateStep:
    """What changes from one update to the next."""

    number: int
    """From 1 (AdamW's bias correction)."""
    learning_rate: float
    """Of the rule that optimizer.name names, warm-up and decay applied; other rules' follow it."""
    seen_V: Tensor | None = None
    """For `rows = "seen"`: rows of the whole vocabulary that occurred (step.seen_rows)."""
    row_factors: Mapping[str, Tensor] = field(default_factory=dict)
    """What rows are multiplied by once they have moved (StepLogits.row_factors), by parameter."""


@dataclass(frozen=True)
class Rates:
    """Rates and decays of fragments, from what was measured of their parameters."""

    peak: float
    """Peak learning rate of the rule that optimizer.name names."""
    assigned: Mapping[str, AssignedRule]
    step: UpdateStep
    measured: Measured
    floors: Mapping[str, float]

    def unscaled(self, fragment: Fragment) -> tuple[float, float]:
        """Rate and decay before the rate is multiplied by a statistic."""
        rule, rate = self.assigned[fragment.name].rule, self.step.learning_rate
        if rule.learning_rate != self.peak:
            rate = rule.learning_rate * rate / self.peak  # the schedule's multiplier
        return rule.rate_and_decay(fragment.kind, rate)

    def of(self, fragment: Fragment) -> tuple[Any, float]:
        """Rate and decay of a fragment; the rate is float, 0-dim, or float64 [rows of the slice] where rows have their own."""
        assigned = self.assigned[fragment.name]
        rate: Any
        rate, decay = self.unscaled(fragment)
        if statistic := assigned.rule.relative_to(fragment.kind):
            rms, floor = self.measured.rms[fragment.name, statistic], assigned.rule.floor(self.floors[fragment.name])
            rate = rate * (rms.clamp(min=floor) if isinstance(rms, Tensor) else max(rms, floor))
        if assigned.rows == "seen":
            assert self.step.seen_V is not None, "rows = 'seen' needs the rows that occurred"
            seen = self.step.seen_V[fragment.rows.start : fragment.rows.stop]
            rate = rate * seen.to(fragment.values.device, torch.float64)
        return rate, decay

    def together(self, fragments: Sequence[Fragment]) -> tuple[Tensor, list[float]]:
        """`of` for many fragments without rates per row: rates, float32 [fragments] on their device, and decays.

        A few launches for all of them: on a GPU those of each alone would take longer than the update of a small tensor.
        """
        device = fragments[0].values.device
        unscaled = [self.unscaled(fragment) for fragment in fragments]
        rules = [self.assigned[fragment.name].rule for fragment in fragments]
        statistics = [rule.relative_to(fragment.kind) for rule, fragment in zip(rules, fragments, strict=True)]
        floors = [
            rule.floor(self.floors[f.name]) if s else 0.0 for f, rule, s in zip(fragments, rules, statistics, strict=True)
        ]
        base, floor = to_device([[rate for rate, _ in unscaled], floors], device, torch.float64)
        one: Any = 1.0 if device.type == "cpu" else torch.ones((), device=device)
        scales = [self.measured.rms[f.name, s] if s else one for f, s in zip(fragments, statistics, strict=True)]
        scale = torch.tensor(scales, dtype=torch.float64) if device.type == "cpu" else torch.stack(scales).double()
        return (base * scale.clamp(min=floor)).float(), [decay for _, decay in unscaled]

    def by_row(self, fragment: Fragment) -> bool:
        """Whether each row of a parameter has its own rate."""
        assigned = self.assigned[fragment.name]
        statistic = assigned.rule.relative_to(fragment.kind)
        return assigned.rows == "seen" or (statistic is not None and statistic.over == "row")


def rate_in(block: FragmentBlock, rate: Any, dtype: torch.dtype) -> Any:
    """The rate of a block: a float, 0-dim, or [rows of the block, 1]."""
    if not isinstance(rate, Tensor):
        return rate
    return rate.to(dtype) if rate.ndim == 0 else rate[block.row : block.row + block.rows, None].to(dtype)


def zero_where(bad: Any, rate: Any) -> Any:
    """A rate of 0 if the update is left out."""
    return torch.where(bad, 0.0, rate) if isinstance(bad, Tensor) else rate


def one_where(bad: Any, factors: Tensor) -> Tensor:
    """Factors of 1 if the update is left out."""
    return torch.where(bad.to(factors.device), 1.0, factors) if isinstance(bad, Tensor) else factors
