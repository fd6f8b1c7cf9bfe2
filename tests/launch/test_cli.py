"""The list of commands, and that asking for it is quick."""

import re
import subprocess
import sys
from importlib.metadata import version
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks.structure import FOLDERS
from launch.cli import COMMANDS, app, command


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_says_of_a_command_what_the_command_says_of_itself(name: str) -> None:
    found: Any = command(name)
    assert found.help.splitlines()[0] == COMMANDS[name][1]
    assert "Example" in found.help or all("Example" in part.help for part in found.commands.values())


def test_the_list_and_each_help_fit_a_screen() -> None:
    for arguments in [[], *([name] for name in COMMANDS)]:
        result = CliRunner().invoke(app, [*arguments, "--help"], env={"COLUMNS": "80"})
        assert result.exit_code == 0
        assert len(result.output.splitlines()) <= 42, arguments


def test_no_help_names_a_path_of_the_checkout() -> None:
    """What it shows works after an installation, anywhere."""
    for name in COMMANDS:
        group: Any = command(name)
        for arguments in [[name], *([name, part] for part in getattr(group, "commands", ()))]:
            told = CliRunner().invoke(app, [*arguments, "--help"], env={"COLUMNS": "200"}).output
            assert "Usage" in told and not re.search(rf"\b({'|'.join(FOLDERS)}|docs|tests|benchmarks)/", told), arguments


def test_help_does_not_wait_for_torch() -> None:
    ask = "import atexit, sys; sys.argv = ['tiglon', '--help']; atexit.register(lambda: print(*sys.modules))\n"
    ask += "from launch.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, timeout=60)
    loaded = done.stdout.split()
    assert "Usage" in done.stdout and "typer" in loaded
    assert not {"torch", "numpy", "pyarrow", "pydantic"} & set(loaded)


def test_an_unknown_command_is_told_in_a_sentence() -> None:
    result = CliRunner().invoke(app, ["trian"])
    assert result.exit_code == 2
    assert "No such command 'trian'" in result.output


def test_the_version_is_that_of_the_package() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0 and result.output == f"tiglon {version('tiglon')}\n"
