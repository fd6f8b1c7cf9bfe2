"""What is wrong with a configuration that pydantic refuses, in one sentence."""

import difflib
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from launch.config import RunConfig


def validation_sentence(error: ValidationError) -> str:
    """The first mistake as one sentence, with the nearest right key for a wrong one."""
    errors = error.errors()
    # a key that takes a string or a list has an error for each: the one that matched further is what was meant; and a key that
    # is missing may be there under a wrong name
    near = (other for other in errors if other["loc"][:2] == errors[0]["loc"][:2])
    first = max(near, key=lambda other: (len(other["loc"]), other["type"] == "extra_forbidden"))
    path = [str(part) for part in first["loc"] if part != "str" and not str(part).startswith("list[")]
    key = ".".join(path)
    match first["type"]:
        case "extra_forbidden":
            legal = _fields(path[:-1])
            near = difflib.get_close_matches(path[-1], legal, 1, 0.5) or _in_another_section(path[-1])
            hint = f"did you mean {near[0]}?" if near else f"legal here: {', '.join(legal)}"
            return f"unknown key {key}; {hint}"
        case "value_error":
            message = first.get("ctx", {}).get("error", first["msg"])
            return f"[{key}] {message}" if key else str(message)
        case "missing":
            return f"{key} is missing; set it"
        case "tuple_type" | "list_type":
            return f"{key} = {first['input']!r}: it takes a list"
        case "model_type" | "dict_type":
            return f"{key} = {first['input']!r}: it takes a table, as {{name = value}}"
        case _:
            return f"{key} = {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"


def _fields(path: list[str]) -> list[str]:
    """The keys of a section, or of a table in it; none for what is no table."""
    model: Any = RunConfig
    for part in path:
        if part.isdigit():  # one of a list of tables
            continue
        field = getattr(model, "model_fields", {}).get(part)
        if field is None:
            return []
        model = table_model(field.annotation)
    return list(getattr(model, "model_fields", {}))


def table_model(annotation: Any) -> type[BaseModel] | None:
    """The model of a key that takes a table, or a list of tables; None for other keys."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((table for inner in get_args(annotation) if (table := table_model(inner))), None)


def _in_another_section(name: str) -> list[str]:
    keys: dict[str, str] = {}
    for section in RunConfig.model_fields:
        for key in _fields([section]):
            keys.setdefault(key, f"{section}.{key}")
            for inner in _fields([section, key]):
                keys.setdefault(inner, f"{section}.{key}.{inner}")
    return [keys[near] for near in difflib.get_close_matches(name, list(keys), 1, 0.7)]
