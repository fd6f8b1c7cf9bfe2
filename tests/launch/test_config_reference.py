"""The page of configuration keys is complete, and its links lead somewhere."""

import re

from launch.config import RunConfig
from launch.config_reference import reference_page
from launch.load_config import load_config

PAGE = reference_page()


def rows(heading: str) -> dict[str, list[str]]:
    """The table below a heading: key -> values, default, what."""
    part = re.split(r"^#+ ", PAGE.partition(f"\n{heading}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in part.splitlines() if line.startswith("| `")]
    return {row[0].strip(" `"): row[1:] for row in cells}


def test_every_key_has_a_row():
    for section, field in RunConfig.model_fields.items():
        assert list(rows(f"## [{section}]")) == list(field.annotation.model_fields)  # type: ignore[union-attr]


def test_the_keys_of_nested_tables_are_there():
    assert list(rows("### PhaseConfig")) == ["from_step", "sources"] and list(rows("### SourceConfig")) == ["path", "weight"]
    assert rows("## [evaluate]")["position"][0] == "the keys of [position](#position)"


def test_every_link_has_a_heading():
    headings = {re.sub(r"[^a-z0-9_ -]", "", heading.lower()) for heading in re.findall(r"^#+ (.+)$", PAGE, re.MULTILINE)}
    links = set(re.findall(r"\]\(#([^)]+)\)", PAGE))
    assert len(links) >= 3 and links <= headings


def test_defaults_are_those_of_an_empty_configuration(tmp_path):
    (tmp_path / "empty.toml").touch()
    config = load_config(tmp_path / "empty.toml")
    assert rows("## [train]")["steps"][1] == f"`{config.train.steps}`" and rows("## [run]")["deterministic"][1] == "`false`"
    assert rows("## [data]")["tokenizer"][1] == "" and rows("### PhaseConfig")["from_step"][1] == "required"
