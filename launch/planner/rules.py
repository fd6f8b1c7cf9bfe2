"""Which update rule moves which parameters; the same as a table."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Literal

from launch.config import RunConfig
from model.config import ModelConfig
from model.sizes import parameter_specs
from trainer.optimizers.config import AssignedRule, OptimizerConfig


def assigned_rules(config: RunConfig) -> Mapping[str, AssignedRule]:
    """The rule of every parameter, by name, in the order of the network."""
    return rules_under(config.model, settings_of(config))


def settings_of(config: RunConfig) -> str:
    """The optimizer in JSON: it has a dictionary, and cannot itself be the key of what is kept."""
    return _settings(_Same(config.optimizer), config.train.precision)


@dataclass(frozen=True, eq=False)
class _Same:
    """An optimizer as a key: equal to the same object only."""

    optimizer: OptimizerConfig

    def __hash__(self) -> int:
        return id(self.optimizer)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.optimizer is self.optimizer


@lru_cache(maxsize=16)
def _settings(same: _Same, precision: Literal["bf16", "fp32"]) -> str:
    return same.optimizer.in_precision(precision).model_dump_json()


@lru_cache(maxsize=16)
def rules_under(model: ModelConfig, settings: str) -> Mapping[str, AssignedRule]:
    """The same, of an optimizer in JSON. Kept, since a plan asks for it thousands of times."""
    optimizer = OptimizerConfig.model_validate_json(settings)
    return {name: optimizer.assigned(name, spec.kind) for name, spec in parameter_specs(model).items()}


def states_per_element(config: RunConfig) -> Mapping[str, int]:
    """Optimizer states of an element of every parameter, by name; those per row or per tensor are too few to count."""
    return states_under(config.model, settings_of(config))


@lru_cache(maxsize=16)
def states_under(model: ModelConfig, settings: str) -> Mapping[str, int]:
    """The same, of an optimizer in JSON."""
    return {
        name: sum(granularity == "element" for granularity in choice.rule.states.values())
        for name, choice in rules_under(model, settings).items()
    }


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
    rules = assigned_rules(config)
    for name, spec in parameter_specs(config.model).items():
        groups.setdefault((spec.kind, rules[name].pattern), []).append((name, prod(spec.shape)))
    return [_line(rules[members[0][0]], kind, members) for (kind, _), members in groups.items()]


def _line(assigned: AssignedRule, kind: str, members: list[tuple[str, int]]) -> RuleLine:
    rate, decay = assigned.rule.rate_and_decay(kind, assigned.rule.learning_rate)
    statistic = assigned.rule.relative_to(kind)
    scale = "" if statistic is None else "row RMS" if statistic.over == "row" else "RMS"
    states = tuple(n if over == "element" else f"{n}/{over}" for n, over in assigned.rule.states.items())
    elements = sum(size for _, size in members)
    return RuleLine(
        kind, members[0][0], len(members), elements, assigned.name, assigned.pattern, assigned.rows, rate, scale, decay, states
    )
