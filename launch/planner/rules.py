"""Which update rule moves which parameters, as a table."""

from dataclasses import dataclass
from math import prod

from launch.config import RunConfig
from model.sizes import parameter_specs


@dataclass(frozen=True)
class RuleLine:
    """The parameters of one kind that one line of the configuration gives to a rule."""

    kind: str
    example: str
    """Name of the first of them."""
    tensors: int
    elements: int
    """Of all of them, full tensors."""
    rule: str
    pattern: str
    """The line of [optimizer.rules]; "" = none, optimizer.name decides."""
    rows: str
    learning_rate: float
    """At the peak."""
    relative_to: str
    """What the rate is multiplied by: "RMS", "row RMS", or "" for an absolute rate."""
    weight_decay: float
    states: tuple[str, ...]
    """Their names, with "/row" or "/matrix" where there is less than one number per element."""


def rule_lines(config: RunConfig) -> list[RuleLine]:
    """One line for each kind of parameter and line of the configuration, in the order of the network."""
    groups: dict[tuple[str, str], list[tuple[str, int]]] = {}
    for name, spec in parameter_specs(config.model).items():
        assigned = config.optimizer.assigned(name, spec.kind)
        groups.setdefault((spec.kind, assigned.pattern), []).append((name, prod(spec.shape)))
    return [_line(config, kind, members) for (kind, _), members in groups.items()]


def _line(config: RunConfig, kind: str, members: list[tuple[str, int]]) -> RuleLine:
    example = members[0][0]
    assigned = config.optimizer.assigned(example, kind)
    rate, decay = assigned.rule.rate_and_decay(kind, assigned.rule.learning_rate)
    statistic = assigned.rule.relative_to(kind)
    scale = "" if statistic is None else "row RMS" if statistic.over == "row" else "RMS"
    states = tuple(n if over == "element" else f"{n}/{over}" for n, over in assigned.rule.states.items())
    elements = sum(size for _, size in members)
    return RuleLine(
        kind, example, len(members), elements, assigned.name, assigned.pattern, assigned.rows, rate, scale, decay, states
    )
