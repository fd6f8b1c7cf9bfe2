"""The sections of the configuration that say how weights move, and which rule moves which parameter.

A new rule is one file beside this one, and its line among the fields of OptimizerConfig.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from trainer.optimizers.adamw import AdamW
from trainer.optimizers.lion import Lion
from trainer.optimizers.muon import Muon
from trainer.optimizers.rule import KINDS, UpdateRule
from trainer.optimizers.tiger import Tiger


class RuleChoice(BaseModel):
    """Which rule moves some parameters, and with which values of its section where they differ from it."""

    model_config = ConfigDict(frozen=True, extra="allow")

    rule: str | None = Field(default=None, description="Section of the rule. Default: optimizer.name.")
    rows: Literal["all", "seen"] = Field(
        default="all",
        description="seen: only rows of the embedding whose token occurred in the step are updated (Su 2023, "
        "kexue.fm/archives/9736).",
    )


@dataclass(frozen=True)
class AssignedRule:
    """The rule of some parameters."""

    name: str
    """Its section, such as "tiger"."""
    rule: UpdateRule
    rows: Literal["all", "seen"] = "all"
    pattern: str = ""
    """The line of [optimizer.rules] that says so; "" = none, optimizer.name does."""
    instead_of: str = ""
    """The rule that was chosen and does not move parameters of this kind: its key `others` names this one."""


class OptimizerConfig(BaseModel):
    """The update rule of most parameters, others by kind or name, and what is common to all rules."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str = Field(default="tiger", description="Section of the update rule.")
    max_grad_norm: float | None = Field(
        default=None, ge=0, description="Clip the global gradient norm to this; 0 = no clipping. Default: zero 1.0, fold 0."
    )
    compile: bool | None = Field(
        default=None,
        description="Rules without a library's kernel as one compiled pass over memory (needs a C++ compiler on a CPU). "
        "Default: train.compile.",
    )
    qk_clip: float | None = Field(
        default=None,
        gt=0,
        description="Largest attention logit that an update leaves a head, tau of QK-Clip (Su 2025, kexue.fm/archives/11126) "
        "bounded by the log-sum-exp; 100 in published runs. Default: none.",
    )
    rounding: Literal["stochastic", "nearest"] = Field(
        default="stochastic", description="fold engine: how bf16 weights and optimizer states are rounded."
    )
    rules: dict[str, RuleChoice] = Field(
        default_factory=dict,
        description="Other rules for some parameters: kind (matrix, embedding, gain, bias) or pattern of names -> rule, rows, "
        "and any key of the rule's section; the first line that fits decides (docs/optimizers.md).",
    )
    tiger: Tiger = Field(default=Tiger(), description="Tiger (Su 2023, kexue.fm/archives/9512).")
    lion: Lion = Field(default=Lion(), description="Lion (Chen et al. 2023, arxiv.org/abs/2302.06675).")
    muon: Muon = Field(default=Muon(), description="Muon (Jordan et al. 2024; Su 2024, kexue.fm/archives/10592).")
    adamw: AdamW = Field(default=AdamW(), description="AdamW (Loshchilov and Hutter 2019, arxiv.org/abs/1711.05101).")

    @property
    def rate(self) -> float:
        """Peak learning rate of the rule that optimizer.name names."""
        return self._section(self.name).learning_rate

    @property
    def clipping(self) -> float:
        """Limit of the global gradient norm where there is a gradient to clip; 0 = none."""
        return 1.0 if self.max_grad_norm is None else self.max_grad_norm

    def assigned(self, parameter: str, kind: str) -> AssignedRule:
        """The rule of a parameter, by the first line of [optimizer.rules] that fits its kind or name.

        Raises:
            ValueError: that line has a value which the rule's section does not take.
        """
        chosen = AssignedRule(self.name, self._section(self.name))
        for pattern, choice in self.rules.items():
            if pattern in _kinds_of_lines(kind) or fnmatchcase(parameter, pattern):
                name = choice.rule or self.name
                chosen = AssignedRule(name, self._with(name, pattern, choice.model_extra or {}), choice.rows, pattern)
                break
        if kind in chosen.rule.kinds:
            return chosen
        others: str = getattr(chosen.rule, "others")  # noqa: B009
        return replace(chosen, name=others, rule=self._section(others), instead_of=chosen.name)

    def _section(self, name: str) -> UpdateRule:
        return getattr(self, name)

    def _with(self, name: str, pattern: str, changed: Mapping[str, Any]) -> UpdateRule:
        section = self._section(name)
        try:
            rule = type(section).model_validate(section.model_dump() | dict(changed))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            legal = ", ".join(("rule", "rows", *type(section).model_fields))
            if first["type"] == "extra_forbidden":
                raise ValueError(f"unknown key rules.{pattern}.{key}; legal here: {legal}") from None
            raise ValueError(f"rules.{pattern}.{key} = {first['input']!r}: {first['msg'].lower()}") from None
        for key, value in changed.items():
            if isinstance(value, bool | str) and type(getattr(rule, key)) is not type(value):
                raise ValueError(f"rules.{pattern}.{key} = {value!r}: it takes a number (docs/configuration.md)")
        return rule

    @field_validator("rules", mode="before")
    @classmethod
    def _by_name_alone(cls, lines: Any) -> Any:
        """`embedding = "adamw"` is short for `embedding = { rule = "adamw" }`."""
        if not isinstance(lines, dict):
            return lines
        return {pattern: {"rule": line} if isinstance(line, str) else line for pattern, line in lines.items()}

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in (names := rule_names(cls)):
            raise ValueError(f"'{name}' is no update rule; legal: {', '.join(names)}")
        return name

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for pattern, choice in self.rules.items():
            if not pattern:
                raise ValueError("rules has a line without a kind or a pattern of names; give it one")
            if choice.rule is not None and choice.rule not in (names := rule_names(type(self))):
                raise ValueError(f"rules.{pattern}.rule = '{choice.rule}' is no update rule; legal: {', '.join(names)}")
            self._with(choice.rule or self.name, pattern, choice.model_extra or {})
            self._check_others(f"rules.{pattern}", choice.rule or self.name, choice.model_extra or {})
        for name in rule_names(type(self)):
            self._check_others(name, name, {})
        return self

    def _check_others(self, section: str, name: str, changed: Mapping[str, Any]) -> None:
        """The rule that moves what this one does not moves everything."""
        rule = self._with(name, section, changed)
        if rule.kinds == KINDS:
            return
        others: str = getattr(rule, "others")  # noqa: B009
        legal = [other for other in rule_names(type(self)) if self._section(other).kinds == KINDS]
        if others not in legal:
            raise ValueError(f"{section}.others = '{others}' is no rule that moves everything; legal: {', '.join(legal)}")


def _kinds_of_lines(kind: str) -> tuple[str, ...]:
    """The kinds that a line of [optimizer.rules] names to mean parameters of a kind: the head is a matrix too."""
    return ("head", "matrix") if kind == "head" else (kind,)


def rule_names(config: type[OptimizerConfig] = OptimizerConfig) -> list[str]:
    """The sections of all update rules."""
    return [name for name, field in config.model_fields.items() if isinstance(field.default, UpdateRule)]
