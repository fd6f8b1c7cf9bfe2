"""The plan printed, and as JSON."""

import json
from io import StringIO

import pytest
from rich.console import Console
from typer import Typer
from typer.testing import CliRunner

from launch.commands.plan import plan_command, show
from launch.config import load_config
from launch.planner.layouts import make_plan
from launch.shipped import shipped_names
from tests.launch.planner.test_layouts import llama


@pytest.mark.parametrize("name", shipped_names())
def test_no_number_of_a_shipped_configuration_is_cut(name: str):
    config, text = load_config(name), StringIO()
    show(make_plan(config, 8, "h200"), config, Console(width=80, file=text))
    assert "…" not in text.getvalue()


def test_the_tables_fit_eighty_columns():
    config = llama()
    console = Console(width=80, record=True, file=StringIO())
    show(make_plan(config, 64, "h200", {"web": 10**12}), config, console)
    text = console.export_text()
    assert "…" not in text
    for words in ("Parameters", "masters", "sum of gradients", "tokens/s per rank", "fold 1x64", "epochs", "not prepared yet"):
        assert words in text


def test_the_command_prints_json(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text("[train]\nglobal_batch_size = 32\n")
    app = Typer()
    app.command()(plan_command)
    result = CliRunner().invoke(app, [str(path), "train.micro_batch_size=4", "--gpus", "2", "--gpu", "h100", "--json"])
    assert result.exit_code == 0, result.output
    made = json.loads(result.output)
    assert made["configured"]["layout"]["micro_batches"] == 4
    assert made["ranked"][0]["memory"]["peak"] > 0


def test_help_fits_a_screen_and_has_an_example():
    app = Typer()
    app.command()(plan_command)
    text = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "80"}).output
    assert "Example: tiglon plan" in text
    assert len(text.splitlines()) <= 40
