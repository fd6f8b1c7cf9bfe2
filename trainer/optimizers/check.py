"""Settings of the optimizer that cannot work with the network or the layout, and those that are probably not meant."""

from collections.abc import Iterable
from math import log
from typing import Literal

from trainer.optimizers.config import AssignedRule, OptimizerConfig, rule_names
from trainer.optimizers.rule import KINDS

Parameter = tuple[str, str]
"""Name and kind."""


def check_optimizer(
    settings: OptimizerConfig, parameters: Iterable[Parameter], tied: bool, engine: Literal["zero", "fold"]
) -> None:
    """Refuse settings that cannot work together.

    Args:
        parameters: of the network.
        tied: the embedding is the head's weight too.

    Raises:
        ValueError: one sentence with the reason and what to do.
    """
    assigned = {parameter: settings.assigned(*parameter) for parameter in parameters}
    for pattern in settings.rules:
        if all(choice.pattern != pattern for choice in assigned.values()):
            kinds = ", ".join(sorted({kind for _, kind in assigned}))
            rule = settings.rules[pattern].rule
            moved = f" and '{rule}' moves" if rule and set(getattr(settings, rule).kinds) != set(KINDS) else ""
            raise ValueError(
                f"optimizer.rules.{pattern} fits no parameter that the lines before it leave{moved}; use a kind ({kinds}) or a "
                "pattern of names such as 'model.layers.*.mlp.*'"
            )
    for (name, kind), choice in assigned.items():
        _check_rows(choice, name, kind, tied)
        _check_decay(choice, kind)
        if engine == "fold":
            _check_fold(choice, kind, settings)
    for choice in set(assigned.values()):
        kinds = {kind for (_, kind), other in assigned.items() if other.name == choice.name}
        if unused := choice.rule.unused(kinds):
            raise ValueError(f"{section(choice)}.{unused}")
    if engine == "fold" and settings.max_grad_norm:
        raise ValueError(
            f"parallel.engine = 'fold' cannot clip (optimizer.max_grad_norm = {settings.max_grad_norm:g}): each gradient is "
            "gone before the global norm is known; leave it out or 0: no step grows with its gradient"
        )


def section(choice: AssignedRule) -> str:
    """The table of the configuration that holds a rule's values."""
    return f"optimizer.rules.{choice.pattern}" if choice.pattern else f"optimizer.{choice.name}"


def _check_rows(choice: AssignedRule, name: str, kind: str, tied: bool) -> None:
    if choice.rows == "all":
        return
    if kind != "embedding":
        raise ValueError(
            f"{section(choice)}.rows = 'seen' is for embeddings, whose rows are tokens, and {name} is a {kind}; leave it out"
        )
    if tied:
        raise ValueError(
            f"{section(choice)}.rows = 'seen' cannot be used with model.tie_word_embeddings = true: the softmax gives every "
            "row a gradient each step, and rows not seen would drop it; use rows = 'all', or untie the embeddings"
        )


def _check_decay(choice: AssignedRule, kind: str) -> None:
    rate, decay = choice.rule.rate_and_decay(kind, choice.rule.learning_rate)
    if rate * decay >= 1:
        where = section(choice)
        raise ValueError(
            f"{where}.learning_rate = {rate:g} times {where}.weight_decay = {decay:g} is {rate * decay:g}: an update would "
            "take away all of a weight and more; make one of them smaller"
        )


def _check_fold(choice: AssignedRule, kind: str, settings: OptimizerConfig) -> None:
    if choice.rule.why_not_folded:
        rules = {name: getattr(settings, name) for name in rule_names(type(settings))}
        foldable = [f"'{name}'" for name, rule in rules.items() if not rule.why_not_folded and kind in rule.kinds]
        where = f"{section(choice)}.rule" if choice.name != settings.name else "optimizer.name"
        where = f"optimizer.{choice.instead_of}.others" if choice.instead_of else where
        raise ValueError(
            f"parallel.engine = 'fold' cannot run {where} = '{choice.name}': {choice.rule.why_not_folded}; "
            f"use {' or '.join(foldable)}, or engine = 'zero'"
        )


def remarks(settings: OptimizerConfig, parameters: Iterable[Parameter], tied: bool, tokens: int) -> list[str]:
    """Warnings, one sentence each, about settings that work but are probably not meant.

    Args:
        tokens: of a sequence.
    """
    warnings: dict[str, None] = {}
    if settings.qk_clip is not None and settings.qk_clip <= log(tokens):
        warnings[
            f"optimizer.qk_clip = {settings.qk_clip:g} clips every head in every step: the bound of logits that are all zero "
            f"is log({tokens}) = {log(tokens):.2f}; use more, 100 in published runs"
        ] = None
    for name, kind in parameters:
        choice = settings.assigned(name, kind)
        warnings |= dict.fromkeys(choice.rule.remarks(section(choice)))
        if kind == "embedding" and not tied and choice.rows == "all" and choice.rule.moves_absent_rows:
            relative = choice.rule.relative_to(kind)
            speed = "exponentially" if relative and relative.over == "row" else "steadily"
            warnings[
                f"an untied embedding drifts under {choice.name}: rows of tokens that stay away move {speed} towards "
                "1 / weight_decay (Su 2023, kexue.fm/archives/9736); use optimizer.rules.embedding.rows=seen or "
                "optimizer.rules.embedding.rule=adamw, or tie the embeddings"
            ] = None
    return list(warnings)
