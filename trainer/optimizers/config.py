"""The sections of the configuration that say how weights move, and which rule moves which parameter.

A new rule is one file beside this one, and its line among the fields of OptimizerConfig.
"""

from collections.abc import Mapping
from dataclasses import dataclass
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
    """The rule of optimizer.name where that does not move parameters of this kind: its key `others` names this one."""


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
        description="Other rules for some parameters: kind (matrix, expert, embedding, head, gain, bias) or pattern of names "
        "-> rule, rows, and any key of the rule's section; the first line that fits decides (docs/optimizers.md).",
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

    def in_precision(self, precision: Literal["bf16", "fp32"]) -> Self:
        """With that of the network as Muon's default. Not for what is recorded: a resumed run may have another."""
        muon = self.muon.model_copy(update={"precision": self.muon.precision or precision})
        return self.model_copy(update={"muon": muon})

    def assigned(self, parameter: str, kind: str) -> AssignedRule:
        """The rule of a parameter, by the first line of [optimizer.rules] that fits its kind or name and moves it.

        Raises:
            ValueError: that line has a value which the rule's section does not take.
        """
        usual = self._usual(kind)
        instead_of = self.name if usual != self.name else ""
        for pattern, choice in self.rules.items():
            name = choice.rule or usual
            if self._fits(pattern, choice, parameter, kind) and kind in self._section(name).kinds:
                rule = self._with(name, pattern, choice.model_extra or {})
                return AssignedRule(name, rule, choice.rows, pattern, "" if choice.rule else instead_of)
        return AssignedRule(usual, self._section(usual), instead_of=instead_of)

    def _usual(self, kind: str) -> str:
        """The rule of parameters of a kind that no line is for."""
        named = self._section(self.name)
        return self.name if kind in named.kinds else getattr(named, "others")  # noqa: B009

    def _fits(self, pattern: str, choice: RuleChoice, parameter: str, kind: str) -> bool:
        """A line for matrices is for experts too, and for the head unless another rule than theirs moves it."""
        if pattern == "matrix" and kind == "expert":
            return True
        if pattern == "matrix" and kind == "head":
            return choice.rule is not None or self._usual("head") == self._usual("matrix")
        return pattern == kind or fnmatchcase(parameter, pattern)

    def _section(self, name: str) -> UpdateRule:
        return getattr(self, name)

    def _with(self, name: str, pattern: str, changed: Mapping[str, Any]) -> UpdateRule:
        section = self._section(name)
        if "others" in changed and "others" in type(section).model_fields:
            raise ValueError(f"rules.{pattern}.others has no effect: a line moves what it fits and nothing else; leave it out")
        try:
            rule = type(section).model_validate(section.model_dump() | dict(changed))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            legal = ", ".join(("rule", "rows", *_keys_of_lines(section)))
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
        self._check_others()
        for pattern, choice in self.rules.items():
            if not pattern:
                raise ValueError("rules has a line without a kind or a pattern of names; give it one")
            if choice.rule is not None and choice.rule not in (names := rule_names(type(self))):
                raise ValueError(f"rules.{pattern}.rule = '{choice.rule}' is no update rule; legal: {', '.join(names)}")
            self._check_line(pattern, choice)
        return self

    def _check_others(self) -> None:
        """The rule that moves what another one does not moves everything."""
        legal = [other for other in rule_names(type(self)) if self._section(other).kinds == KINDS]
        for name in rule_names(type(self)):
            if name not in legal and (others := getattr(self._section(name), "others")) not in legal:  # noqa: B009
                raise ValueError(f"{name}.others = '{others}' is no rule that moves everything; legal: {', '.join(legal)}")

    def _check_line(self, pattern: str, choice: RuleChoice) -> None:
        """A line's keys are those of a rule that it gives parameters to, and that rule moves parameters of its kind."""
        kinds = [pattern] if pattern in KINDS else KINDS
        names = dict.fromkeys(choice.rule or self._usual(kind) for kind in kinds)
        if not any(kind in self._section(name).kinds for kind in kinds for name in names):
            able = [f"'{name}'" for name in rule_names(type(self)) if pattern in self._section(name).kinds]
            raise ValueError(f"rules.{pattern}.rule = '{choice.rule}' does not move a {pattern}; legal: {', '.join(able)}")
        errors = []
        for name in names:  # a pattern of names may be for parameters of several rules
            try:
                self._with(name, pattern, choice.model_extra or {})
            except ValueError as error:
                errors.append(error)
        if len(errors) == len(names):
            raise errors[0]


def _keys_of_lines(section: UpdateRule) -> list[str]:
    """What a line of [optimizer.rules] may change of a rule."""
    return [key for key in type(section).model_fields if key != "others"]


def rule_names(config: type[OptimizerConfig] = OptimizerConfig) -> list[str]:
    """The sections of all update rules."""
    return [name for name, field in config.model_fields.items() if isinstance(field.default, UpdateRule)]
