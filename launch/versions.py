"""Keys and values of a configuration that earlier versions called otherwise. docs/checkpoints.md says what is promised."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

Path = tuple[str, ...]
"""The parts of a dotted key."""

RENAMED: dict[Path, Path] = {("parallel", "reduce_bucket_numbers"): ("parallel", "reduce_bucket_elements")}
"""Keys whose name alone has changed, since 0.1.0."""

RENAMED_VALUES: dict[Path, dict[Any, Any]] = {
    ("position", "yarn_ramp"): {"turns": "rotations"},
    ("evaluate", "position", "yarn_ramp"): {"turns": "rotations"},
}
"""Values whose name has changed, since 0.1.0."""

SECTIONS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("learning_rate", "weight_decay", "betas"), ("tiger", "lion", "adamw")),
    "eps": ("adamw",), "rms_floor": ("tiger",), "embedding_rms": ("tiger",), "non_finite": ("tiger",),
}  # fmt: skip
"""Keys that [optimizer] had for all rules, and the sections that have them now."""
EMBEDDING = ("embedding", "embedding_learning_rate", "embedding_weight_decay", "eps")
"""Keys of [optimizer] that said how the embedding is updated: now the line `embedding` of [optimizer.rules]."""


def translate(values: dict[str, Any]) -> list[str]:
    """Give the keys of a configuration their present names, in place; a sentence for each renamed one.

    Raises:
        ValueError: a key has its earlier and its present name.
    """
    said = []
    name = _get(values, ("optimizer", "name")) or "tiger"
    for old in list(_old_paths(values)):
        value = _pop(values, old)
        news = list(_present(old, value, name, values))
        for new, _ in news:
            if _get(values, new) is not None and old[-1] not in EMBEDDING:
                raise ValueError(f"{_dotted(old)} is now {_dotted(new)}, and both are set; leave the first one out")
        for new, now in news:
            _set(values, new, now)
            said.append(f"{_dotted(old)} is now {_dotted(new)}")
    return [*said, *_translate_values(values)]


def translate_override(
    path: Path, value: Any, values: Mapping[str, Any], name: str
) -> tuple[list[tuple[Path, Any]], list[str]]:
    """What an override sets, under present names, and a sentence for each renamed key.

    Args:
        values: the configuration so far, under present names.
        name: optimizer.name after all overrides.
    """
    if path not in RENAMED and not _is_old_optimizer(path, value):
        return [(path, value)], []
    news = list(_present(path, value, name, values))
    return news, [f"{_dotted(path)} is now {_dotted(new)}" for new, _ in news]


def translate_checkpoint(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration that a checkpoint holds, under present names; keys that had no effect on it are left out."""
    position = config.get("position", {})
    for key, kind in (("yarn_ramp", "yarn"), ("mixed_exponent", "ntk-mixed")):
        for section in (position, config.get("evaluate", {}).get("position") or {}):
            if section.get("kind") != kind:
                section.pop(key, None)
    for key in list(SECTIONS) + list(EMBEDDING):
        if _get(config, ("optimizer", key)) is None:
            config.get("optimizer", {}).pop(key, None)
    translate(config)
    return config


def _old_paths(values: Mapping[str, Any]) -> Iterator[Path]:
    """Of renamed keys, in an order in which each can be translated; `eps` twice serves AdamW and the embedding."""
    yield from (path for path in RENAMED if _get(values, path) is not None)
    given = values.get("optimizer", {})
    if isinstance(given, dict):
        yield from (("optimizer", key) for key in (*EMBEDDING, *SECTIONS) if key in given and key != "eps")
        yield from (("optimizer", "eps") for _ in range("eps" in given))


def _is_old_optimizer(path: Path, value: Any) -> bool:
    return len(path) == 2 and path[0] == "optimizer" and path[1] in (*SECTIONS, *EMBEDDING) and not isinstance(value, dict)


def _present(old: Path, value: Any, name: str, values: Mapping[str, Any]) -> Iterator[tuple[Path, Any]]:
    """The present keys of an earlier one, with their values."""
    line = ("optimizer", "rules", "embedding")
    by_adamw = _get(values, (*line, "rule")) == "adamw"
    match old[-1]:
        case "embedding" if value == "lazy":
            yield line, {"rows": "seen"}
        case "embedding" if value == "adamw":
            yield line, {"rule": "adamw", "learning_rate": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.0, "eps": 1e-8}
        case "embedding":
            yield from [(line, {})] if _get(values, line) else []
        case "embedding_learning_rate" | "embedding_weight_decay":
            yield from [((*line, old[-1].removeprefix("embedding_")), value)] if by_adamw else []
        case "betas" if name == "tiger":
            yield ("optimizer", "tiger", "beta"), value[0] if isinstance(value, list) and len(value) == 1 else value
        case key if key in SECTIONS:
            owner = name if name in SECTIONS[key] else SECTIONS[key][0]
            yield ("optimizer", owner, key), value
            if key == "eps" and by_adamw:
                yield (*line, "eps"), value
        case _:
            yield RENAMED[old], value


def _translate_values(values: dict[str, Any]) -> Iterable[str]:
    for path, names in RENAMED_VALUES.items():
        value = _get(values, path)
        if isinstance(value, str) and value in names:
            _set(values, path, names[value])
            yield f"{_dotted(path)} = '{value}' is now '{names[value]}'"


def _dotted(path: Path) -> str:
    return ".".join(path)


def _get(values: Mapping[str, Any], path: Path) -> Any:
    found: Any = values
    for part in path:
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _set(values: dict[str, Any], path: Path, value: Any) -> None:
    for part in path[:-1]:
        values = values.setdefault(part, {})
    values[path[-1]] = value


def _pop(values: dict[str, Any], path: Path) -> Any:
    for part in path[:-1]:
        values = values[part]
    return values.pop(path[-1])
