"""Write TOML; Python itself only reads it."""

import json
import math
from typing import Any

from launch.config import RunConfig


def dump(config: RunConfig) -> str:
    """The configuration as TOML that `load_config` reads back to the same values (keys that are None are left out)."""
    return as_toml(config.model_dump(mode="json", exclude_none=True))


def as_toml(values: dict[str, Any]) -> str:
    """Nested plain values as TOML, each table below its own heading."""
    lines: list[str] = []
    _table(values, "", lines)
    return "\n".join(lines) + "\n"


def _table(values: dict[str, Any], name: str, lines: list[str]) -> None:
    plain = {key: value for key, value in values.items() if not isinstance(value, dict)}
    if name and plain:
        lines.append(f"{'' if not lines else chr(10)}[{name}]")
    lines.extend(f"{_toml_key(key)} = {_toml(value)}" for key, value in plain.items())
    for key, value in values.items():
        if isinstance(value, dict):
            _table(value, f"{name}.{_toml_key(key)}" if name else _toml_key(key), lines)


def _toml_key(key: str) -> str:
    """A key, quoted where it is more than a word."""
    return key if key.replace("_", "").replace("-", "").isalnum() else json.dumps(key)


def _toml(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case float():
            return repr(value) if math.isfinite(value) else str(value)
        case list():
            return "[" + ", ".join(_toml(item) for item in value) + "]"
        case dict():
            return "{" + ", ".join(f"{_toml_key(key)} = {_toml(item)}" for key, item in value.items()) + "}"
        case str():
            return json.dumps(value)
        case _:
            return repr(value)
