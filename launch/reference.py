"""Every configuration key as a page: `python -m launch.reference > docs/configuration.md`."""

from typing import Any, get_args, get_origin

from pydantic import BaseModel

from launch.config import RunConfig

INTRODUCTION = """# Configuration

One TOML file, then `section.key=value` on the command line; the resolved copy is written to `RUN/config.toml`. This page is
made from the source by `python -m launch.reference`; a test compares the two.
"""


def page() -> str:
    """The page as Markdown."""
    parts = [INTRODUCTION]
    for name, field in RunConfig.model_fields.items():
        assert isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        parts.append(f"## [{name}]\n\n{field.description}\n\n{_table(field.annotation)}")
    return "\n".join(parts)


def _table(section: type[BaseModel]) -> str:
    rows = ["| key | values | default | what |", "|---|---|---|---|"]
    for name, field in section.model_fields.items():
        default = "required" if field.is_required() else _default(field.get_default(call_default_factory=True))
        rows.append(f"| `{name}` | {_values(field.annotation)} | {default} | {field.description} |")
    return "\n".join(rows) + "\n"


def _default(value: Any) -> str:
    return (
        "" if value is None or value == [] or value == "" else f"`{str(value).lower() if isinstance(value, bool) else value}`"
    )


def _values(annotation: Any) -> str:
    arguments = [argument for argument in get_args(annotation) if argument is not type(None)]
    if str(get_origin(annotation)) == "typing.Literal":
        return ", ".join(f"`{value}`" for value in arguments)
    if isinstance(annotation, type) and not arguments:
        return f"[{annotation.__name__}]" if issubclass(annotation, BaseModel) else annotation.__name__
    inner = " or ".join(_values(argument) for argument in arguments)
    return f"list of {inner}" if get_origin(annotation) in (list, tuple) else inner


if __name__ == "__main__":
    print(page(), end="")
