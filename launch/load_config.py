"""Read a configuration: a TOML file, then `section.key=value` from the command line, checked as a whole.

Nothing here touches hardware or starts a process.
"""

import copy
import tomllib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from launch.config import RESOLVED, RunConfig
from launch.config_checks import check_checkpoints, check_config
from launch.config_mistakes import table_model, validation_sentence
from launch.shipped import SHIPPED, is_shipped, shipped_names
from launch.versions import translate


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = (), settled: bool = True) -> RunConfig:
    """Read a TOML file, apply `section.key=value` overrides, check it.

    Args:
        path: of the file, or the name of a shipped one, such as quickstart.
        settled: as in build_config.

    Raises:
        ValueError, FileNotFoundError: one sentence for the first mistake.
    """
    file = SHIPPED / f"{path}.toml" if is_shipped(path) else Path(path)
    if not file.is_file():
        fault, names = "is a directory" if file.is_dir() else "does not exist", ", ".join(shipped_names())
        raise FileNotFoundError(f"configuration {path} {fault}; give the path of a TOML file, or a shipped one's name: {names}")
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8-sig"))
        values.pop(RESOLVED, None)
    except OSError as error:
        raise ValueError(f"configuration {path} cannot be read ({error.strerror}); give the path of a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None
    return build_config(values, overrides, str(path), settled)


def build_config(
    values: dict[str, Any],
    overrides: list[str] | tuple[str, ...] = (),
    where: str = "the configuration",
    settled: bool = True,
) -> RunConfig:
    """A checked configuration from plain values and overrides.

    Args:
        settled: False = what is left unset may still come from the checkpoint that the run resumes: whether the values hold
            together, `begin_run` (launch/preflight.py) checks once they are known.

    Raises:
        ValueError: one sentence for the first mistake.
    """
    values = copy.deepcopy(values)
    assignments = [_assignment(override) for override in overrides]
    for path, value in assignments:
        _set(values, path, value)
    renamed = translate(values, [path for path, _ in assignments])
    _refuse_booleans(values, RunConfig)
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{where}: {validation_sentence(error)}") from None
    if settled:
        check_config(config)
    else:
        check_checkpoints(config.checkpoint)
    config.remember_renamed(renamed)
    return config


def _refuse_booleans(values: dict[str, Any], model: type[BaseModel], prefix: str = "") -> None:
    """Refuse true and false where a number is wanted: pydantic would take them for 1 and 0."""
    for key, value in values.items():
        field = model.model_fields.get(key)
        if field is None:
            continue
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        if isinstance(value, dict) and (table := table_model(field.annotation)):
            _refuse_booleans(value, table, f"{prefix}{key}.")
        elif isinstance(value, bool) and bool not in kinds:
            raise ValueError(f"{prefix}{key} = {str(value).lower()}: it takes no truth value (docs/configuration.md)")


def _assignment(override: str) -> tuple[tuple[str, ...], Any]:
    """Key and value of an override."""
    key, equals, text = override.partition("=")
    path = _key_path(key)
    if not equals or len(path) < 2:
        raise ValueError(f"override '{override}' must read section.key=value, for example train.steps=100")
    try:
        return path, tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return path, text.strip()


def _set(values: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for part in path[:-1]:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise ValueError(f"override of {'.'.join(path)}: {part} is a value, not a section")
    values[path[-1]] = value


def _key_path(key: str) -> tuple[str, ...]:
    """The parts of a dotted key, of which one with dots of its own is quoted, as in TOML."""
    try:
        table: Any = tomllib.loads(f"{key} = 0")
    except tomllib.TOMLDecodeError:
        return tuple(key.strip().split("."))
    path = []
    while isinstance(table, dict) and table:
        (name, table), *_ = table.items()
        path.append(name)
    return tuple(path)
