"""The values of a configuration that act, and which of them differ between two configurations."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from launch.config import RunConfig
from launch.load_config import build_config

_NOT_TRAINING = ("run.dir", "checkpoint.resume")
_TOLD = ("optimizer.max_grad_norm",)
"""Named though it only follows another key: who changes the engine may not know that fold clips nothing."""


def acting_values(config: RunConfig) -> dict[str, Any]:
    """Plain values by section, with what is left unset filled in and without model keys that nothing reads; None where a choice
    depends on ranks or memory."""
    values = config.model_dump(mode="json")
    train, schedule = config.train, config.schedule
    values["model"] = config.model.effective()
    values["evaluate"]["position"] = values["evaluate"]["position"] or dict(values["position"])
    trained_length = config.position.trained_length or train.sequence_length
    for position in (values["position"], values["evaluate"]["position"]):
        position["trained_length"] = position["trained_length"] or trained_length
    after_peak, fifth = max(0, train.steps - max(1, schedule.warmup_steps)), max(1, train.steps // 5)
    fall = {"linear": after_peak, "cosine": after_peak, "warmup-stable-decay": fifth}.get(schedule.kind)
    values["schedule"]["decay_steps"] = schedule.decay_steps or fall
    values["optimizer"]["max_grad_norm"] = 0.0 if config.parallel.engine == "fold" else config.optimizer.clipping
    values["optimizer"]["muon"]["precision"] = config.optimizer.in_precision(train.precision).muon.precision
    values["optimizer"]["compile"] = train.compile if config.optimizer.compile is None else config.optimizer.compile
    values["checkpoint"]["directory"] = config.checkpoint.directory or f"{config.run.dir}/checkpoints"
    return values


def changed_values(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """`section.key: old -> new` for every value that is given otherwise and acts otherwise, in the order of the new
    configuration.

    A key that is set to what it was when unset has not changed; nor has one that only follows another, which is named (_TOLD).

    Args:
        before: plain values of a configuration; keys may be missing, as in the checkpoint of an older version.
        now: of another.
    """
    acting = before, now
    with suppress(ValueError):  # of another version, whose values are compared as they stand
        acting = acting_values(build_config(before)), acting_values(build_config(now))
    given = [key for key, _, _ in _differences(before, now)]
    return [
        f"{key}: {shown_value(old)} -> {shown_value(new)}"
        for key, old, new in _differences(*acting)
        if key not in _NOT_TRAINING and (key in _TOLD or any(_inside(key, other) or _inside(other, key) for other in given))
    ]


def _differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(section.key, old, new) of values that differ."""
    for key in [*now, *(key for key in before if key not in now)]:
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key}", old, new


def shown_value(value: Any) -> str:
    """A value for one line: as Python writes it where it would not be seen there."""
    text = str(value)
    return text if text and text.isprintable() else repr(value)


def _inside(key: str, table: str) -> bool:
    return f"{key}.".startswith(f"{table}.")
