"""Keys and values of a configuration that earlier versions called otherwise. docs/checkpoints.md says what is promised."""

from collections.abc import Collection, Iterable, Iterator, Mapping
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
EMBEDDING = ("embedding", "embedding_learning_rate", "embedding_weight_decay")
"""Keys of [optimizer] that said how the embedding is updated: now the line `embedding` of [optimizer.rules]."""


def translate(values: dict[str, Any], typed: Collection[Path] = ()) -> list[str]:
    """Give the keys of a configuration their present names, in place; a sentence for each renamed one.

    Args:
        typed: keys that overrides have set: they win over the file's, whichever name either has.

    Raises:
        ValueError: a key has its earlier and its present name, or a value that it never had.
    """
    said = []
    for old, news in [*_renamed(values), *_of_log(values), *_of_optimizer(values)]:
        for new, value in news.items():
            if _get(values, new) is not None:
                if (old in typed) == _any_typed(new, typed):
                    raise ValueError(f"{_dotted(old)} is now {_dotted(new)}, and both are set; leave the first one out")
                if old not in typed:
                    continue
            _set(values, new, value)
            said.append(f"{_dotted(old)} is now {_dotted(new)}")
    return [*said, *_translate_values(values)]


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


def translate_position(values: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a position map under present names."""
    given = {"position": dict(values)}
    translate(given)
    return given["position"]


def _renamed(values: dict[str, Any]) -> Iterator[tuple[Path, dict[Path, Any]]]:
    """Each renamed key that is set, which is taken away, and what it sets."""
    for old, new in RENAMED.items():
        if _get(values, old) is not None:
            yield old, {new: _pop(values, old)}


def _of_log(values: dict[str, Any]) -> Iterator[tuple[Path, dict[Path, Any]]]:
    """The same for log.wandb, the project of what is now one of several trackers."""
    section = values.get("log")
    if isinstance(section, dict) and (project := section.pop("wandb", None)) is not None:
        yield (
            ("log", "wandb"),
            {("log", "tracker"): "wandb", ("log", "project"): project} if project else {("log", "tracker"): "none"},
        )


def _of_optimizer(values: dict[str, Any]) -> Iterator[tuple[Path, dict[Path, Any]]]:
    """The same for [optimizer]."""
    section = values.get("optimizer")
    if not isinstance(section, dict):
        return
    old = {key: section.pop(key) for key in (*SECTIONS, *EMBEDDING) if key in section}
    name, line = section.get("name", "tiger"), ("optimizer", "rules", "embedding")
    if (how := old.pop("embedding", None)) is not None:
        yield ("optimizer", "embedding"), {line: _embedding(how, old)} if how != "plain" else {}
    elif _get(values, (*line, "rule")) == "adamw":
        for key in ("learning_rate", "weight_decay"):
            if f"embedding_{key}" in old:
                yield ("optimizer", f"embedding_{key}"), {(*line, key): old[f"embedding_{key}"]}
    for key, sections in SECTIONS.items():
        if key in old:
            owner, value = name if name in sections else sections[0], old[key]
            if key == "betas" and owner == "tiger":
                key_now, value = "beta", value[0] if isinstance(value, list) and len(value) == 1 else value
            else:
                key_now = key
            yield ("optimizer", key), {("optimizer", owner, key_now): value}


def _embedding(how: Any, old: Mapping[str, Any]) -> dict[str, Any]:
    """The line of [optimizer.rules] that does what `optimizer.embedding` said."""
    match how:
        case "lazy":
            return {"rows": "seen"}
        case "adamw":
            own = {key: old.get(f"embedding_{key}") for key in ("learning_rate", "weight_decay")} | {"eps": old.get("eps")}
            given = {key: value for key, value in own.items() if value is not None}
            return {"rule": "adamw", "learning_rate": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.0, "eps": 1e-8} | given
        case _:
            raise ValueError(
                f"optimizer.embedding = {how!r}: it was 'lazy', 'adamw' or 'plain'; now a line of [optimizer.rules] says it, "
                'such as embedding = { rows = "seen" }'
            )


def _any_typed(path: Path, typed: Collection[Path]) -> bool:
    """Whether an override has set a key or something in its table."""
    return any(other[: len(path)] == path or path[: len(other)] == other for other in typed)


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
        table = values.setdefault(part, {})
        if not isinstance(table, dict):
            raise ValueError(f"{_dotted(path[:-1])} = {table!r} is a value, not a table")
        values = table
    values[path[-1]] = value


def _pop(values: dict[str, Any], path: Path) -> Any:
    for part in path[:-1]:
        values = values[part]
    return values.pop(path[-1])
