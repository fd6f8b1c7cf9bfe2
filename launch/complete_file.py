"""A configuration as a complete file: what it sets as it stands there, and every other key in a comment."""

import re
import textwrap
import tomllib
from collections.abc import Iterator
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from launch.config import RunConfig
from launch.config_reference import SECTION_NAMES, described_values
from launch.toml import as_toml

NOTE = """\
#
# What it leaves out stands in comments: `#key = value` with the default, to be set by removing the #, and `# key = ...` where
# there is none. Paths are relative to the directory that a command runs in.
"""
WIDTH = 128
SETTING_WIDTH = 34
"""Characters before the comment of a line, in the shipped files too."""


def complete_file(text: str) -> str:
    """The same configuration with every key of every section.

    Args:
        text: TOML that sets keys in tables of their own, as the shipped configurations do. A table's comments stay with it.
    """
    header, *tables = re.split(r"^(?=\[)", text, flags=re.MULTILINE)
    written = {table[1 : table.index("]")]: table.partition("\n")[2].rstrip() for table in tables}
    lines, given = [header.rstrip() + "\n" + NOTE], tomllib.loads(text)
    for name, section, meaning in _tables():
        lines.append(_with_meaning(f"[{name}]", meaning))
        if name in written:
            lines.append(written[name])
        lines += _missing(name, section, _at(given, name))
        lines.append("")
    return "\n".join(lines)


def _tables() -> Iterator[tuple[str, Any, str]]:
    """Name, type and meaning of every section and of the tables in it; the type of a table of tables is a dict."""
    for name, field in RunConfig.model_fields.items():
        yield name, field.annotation, field.description or ""
        for key, inner in _fields(field.annotation).items():
            if _is_table(inner):
                yield f"{name}.{key}", inner.annotation, inner.description or ""


def _missing(name: str, section: Any, given: dict[str, Any]) -> Iterator[str]:
    """The keys of a table that are not given, each in a comment."""
    if get_origin(section) is dict:
        for key, field in _fields(get_args(section)[1]).items():
            yield _commented("# NAME.", key, field, field.get_default())
        return
    defaults = _at(RunConfig().model_dump(mode="json"), name)
    for key, field in _fields(section).items():
        if key not in given and not _is_table(field):
            yield _commented("# " if defaults[key] is None else "#", key, field, defaults[key])


def _commented(mark: str, key: str, field: FieldInfo, default: Any) -> str:
    """A key behind a mark, with its default, values and meaning."""
    setting = f"{key} = ..." if default is None else as_toml({key: default}).strip()
    values = described_values(field.annotation, _plain).replace("`", "")
    return _with_meaning(f"{mark}{setting}", f"({values}) {field.description}")


def _with_meaning(setting: str, meaning: str) -> str:
    """A line, and beside it a comment that continues below itself."""
    first, *more = textwrap.wrap(meaning, WIDTH - SETTING_WIDTH - 3, break_on_hyphens=False)
    return "\n".join([f"{setting:{SETTING_WIDTH}} # {first}", *(f"{'':{SETTING_WIDTH}} # {line}" for line in more)])


def _plain(table: type[BaseModel]) -> str:
    """What a table's keys are, without a link."""
    return f"the keys of [{SECTION_NAMES[table]}]" if table in SECTION_NAMES else f"{{{', '.join(table.model_fields)}}}"


def _fields(section: Any) -> dict[str, FieldInfo]:
    return getattr(section, "model_fields", {})


def _is_table(field: FieldInfo) -> bool:
    """Whether a key is always a table, and so has a heading of its own."""
    return bool(_fields(field.annotation)) or get_origin(field.annotation) is dict


def _at(values: dict[str, Any], name: str) -> dict[str, Any]:
    """The table of that dotted name; {} if there is none."""
    for part in name.split("."):
        values = values.get(part, {})
    return values
