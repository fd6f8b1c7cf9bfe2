"""Every configuration key as a page: `python -m launch.config_reference > docs/configuration.md`."""

from collections.abc import Callable, Iterator
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from launch.config import RunConfig
from launch.shipped import lesson, plan_command_of, shipped_names, shipped_text

INTRODUCTION = """# Configuration

One TOML file, then `section.key=value` on the command line; the resolved copy is written to `RUN/config.toml`. This page is
made from the source by `python -m launch.config_reference`; a test compares the two.

## Shipped configurations

`tiglon init NAME > my.toml` prints one with every key, its default and its meaning; `tiglon train NAME` trains it as it is.

"""
SECTION_NAMES = {field.annotation: name for name, field in RunConfig.model_fields.items()}
"""Type of a section -> its name."""


def reference_page() -> str:
    """The page as Markdown: a table per section, and below it one for each kind of table that a key of the section takes."""
    parts = [INTRODUCTION + _shipped()]
    for name, field in RunConfig.model_fields.items():
        section: Any = field.annotation
        parts.append(f"## [{name}]\n\n{field.description}\n\n{_table(section)}")
        for nested in dict.fromkeys(_tables_in(section)):
            title = f"[{name}.{own}]" if (own := _key_of(nested, section)) else nested.__name__
            parts.append(f"### {title}\n\n{nested.__doc__}\n\n{_table(nested)}")
    return "\n".join(parts)


def _shipped() -> str:
    texts = [(name, shipped_text(name)) for name in shipped_names()]
    rows = [f"| `{name}` | {lesson(text)} | `{plan_command_of(text)}` |" for name, text in texts]
    return "\n".join(["| name | what it shows | how it is planned |", "|---|---|---|", *rows]) + "\n"


def _tables_in(section: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """The kinds of tables that keys of a section take, and keys of those; not the sections themselves."""
    for field in section.model_fields.values():
        for kind in _kinds(field.annotation):
            if isinstance(kind, type) and issubclass(kind, BaseModel) and kind not in SECTION_NAMES:
                yield kind
                yield from _tables_in(kind)


def _key_of(table: type[BaseModel], section: type[BaseModel]) -> str:
    """The key of a section that is such a table and nothing else; "" if there is none."""
    return next((key for key, field in section.model_fields.items() if field.annotation is table), "")


def _kinds(annotation: Any) -> Iterator[Any]:
    yield annotation
    for argument in _arguments(annotation):
        yield from _kinds(argument)


def _arguments(annotation: Any) -> list[Any]:
    """Types inside a type; of an Annotated one the type alone."""
    arguments = get_args(annotation)
    return list(arguments[:1] if hasattr(annotation, "__metadata__") else arguments)


def _table(section: type[BaseModel]) -> str:
    rows = ["| key | values | default | what |", "|---|---|---|---|"]
    for name, field in section.model_fields.items():
        default = "required" if field.is_required() else _default(field.get_default(call_default_factory=True))
        rows.append(f"| `{name}` | {described_values(field.annotation, _link)} | {default} | {field.description} |")
    return "\n".join(rows) + "\n"


def _default(value: Any) -> str:
    if value is None or value in ([], (), {}, "") or isinstance(value, BaseModel):
        return ""
    value = list(value) if isinstance(value, tuple) else value
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def described_values(annotation: Any, of_table: Callable[[type[BaseModel]], str]) -> str:
    """The values that a key of this type takes, a literal one in backquotes; `of_table` describes a table."""
    arguments = [argument for argument in _arguments(annotation) if argument not in (type(None), ...)]
    if str(get_origin(annotation)) == "typing.Literal":
        return ", ".join(f"`{value}`" for value in arguments)
    if isinstance(annotation, type) and not arguments:
        return of_table(annotation) if issubclass(annotation, BaseModel) else annotation.__name__
    inner = " or ".join(dict.fromkeys(described_values(argument, of_table) for argument in arguments))
    if get_origin(annotation) is dict:
        return f"table of {described_values(arguments[1], of_table)}"
    return f"list of {inner}" if get_origin(annotation) in (list, tuple) else inner


def _link(table: type[BaseModel]) -> str:
    if table in SECTION_NAMES:
        return f"the keys of [{SECTION_NAMES[table]}](#{SECTION_NAMES[table]})"
    for name, field in RunConfig.model_fields.items():
        section: Any = field.annotation
        if own := _key_of(table, section):
            return f"the keys of [{name}.{own}](#{name}{own})"
    return f"[{table.__name__}](#{table.__name__.lower()})"


if __name__ == "__main__":
    print(reference_page(), end="")
