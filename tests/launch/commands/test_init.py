"""A configuration to begin from: listed and refused without waiting for torch, printed whole."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from launch.cli import app
from launch.complete_file import complete_file
from launch.shipped import lesson, shipped_names, shipped_text


def test_it_prints_the_whole_file():
    result = CliRunner().invoke(app, ["init", "muon"])
    assert result.exit_code == 0 and result.output == complete_file(shipped_text("muon"))


def test_without_a_name_it_lists_all_with_their_first_sentence():
    result = CliRunner().invoke(app, ["init"], env={"COLUMNS": "80"})
    assert result.exit_code == 0 and max(map(len, result.output.splitlines())) <= 80
    said = " ".join(result.output.split())
    for name in shipped_names():
        assert f"{name} {lesson(shipped_text(name))}" in said


@pytest.mark.parametrize(("arguments", "status"), [([], 0), (["gtp-124m"], 2)])
def test_listing_and_refusing_do_not_wait_for_torch(arguments: list[str], status: int):
    ask = "import atexit, sys; sys.argv[0] = 'tiglon'; atexit.register(lambda: print(*sys.modules))\n"
    ask += "from launch.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", ask, "init", *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == status and "launch.shipped" in done.stdout
    assert "torch" not in done.stdout.split()
    if status:
        assert done.stderr.startswith("tiglon: no shipped configuration has the name gtp-124m; did you mean gpt-124m?")
