"""A shipped configuration with every key: the same configuration, in which each key can be set as it stands."""

import re
import tomllib
from typing import Any

import pytest
from pydantic import BaseModel

from launch.complete_file import WIDTH, complete_file
from launch.config import RunConfig
from launch.load_config import build_config
from launch.shipped import shipped_names, shipped_text

COMPLETE = {name: complete_file(shipped_text(name)) for name in shipped_names()}
DEFAULT = re.compile(r"^#(?=\w+ = )", re.MULTILINE)
"""The mark of a key with a default."""


def built(text: str) -> RunConfig:
    return build_config(tomllib.loads(text))


@pytest.mark.parametrize("name", COMPLETE)
def test_it_is_the_shipped_configuration_with_and_without_the_defaults(name: str):
    shipped, text = built(shipped_text(name)), COMPLETE[name]
    assert built(text) == shipped
    assert built(DEFAULT.sub("", text)) == shipped
    assert len(DEFAULT.findall(text)) > 80


def test_each_default_can_be_set_alone():
    text = COMPLETE["quickstart"]
    for found in DEFAULT.finditer(text):
        assert built(text[: found.start()] + text[found.end() :]) == built(text), text[found.start() :].partition("\n")[0]


def keys(section: Any) -> set[str]:
    """Of a section and of the tables that it always has."""
    found: set[str] = set()
    for key, field in section.model_fields.items():
        is_table = isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        found |= keys(field.annotation) if is_table else {key}
    return found


@pytest.mark.parametrize("name", COMPLETE)
def test_every_key_of_every_section_stands_in_it_once(name: str):
    settings: dict[str, list[str]] = {}
    for line in COMPLETE[name].splitlines():
        if heading := re.match(r"\[(\w+(\.\w+)?)\]", line):
            settings[heading[1]] = []
        elif (setting := re.match(r"(?:# ?)?(\w+) = ", line)) and settings:
            settings[[*settings][-1]].append(setting[1])
    for section, field in RunConfig.model_fields.items():
        of_section = [key for table, found in settings.items() if table.partition(".")[0] == section for key in found]
        assert {*of_section} - {"embedding"} == keys(field.annotation) - {"rules"}
    assert all(len(found) == len({*found}) for found in settings.values())


@pytest.mark.parametrize("name", COMPLETE)
def test_it_keeps_what_is_written_and_fits_an_editor(name: str):
    text = COMPLETE[name]
    written = [line for line in shipped_text(name).splitlines() if line.strip("#") and not line.startswith("[")]
    assert sorted(line for line in text.splitlines() if line in written) == sorted(written)
    assert max(map(len, text.splitlines())) <= WIDTH and text.endswith("\n") and "\n\n\n" not in text


def test_a_key_says_its_default_its_values_and_its_meaning():
    text = COMPLETE["quickstart"]
    assert re.search(r'^#kind = "rope" +# \(rope, none, pi, .*', text, re.MULTILINE)
    assert re.search(r"^#seed = 0 +# \(int\) Seed of the initial weights and of the data order\.$", text, re.MULTILINE)
    assert re.search(r"^# sliding_window = \.\.\. +# \(int\) Tokens a windowed layer sees", text, re.MULTILINE)
    assert re.search(r"^# position = \.\.\. +# \(the keys of \[position\]\) Position map to evaluate with", text, re.MULTILINE)
    assert re.search(r"^#curriculum = \[\] +# \(list of \{from_step, sources\}\) ", text, re.MULTILINE)
