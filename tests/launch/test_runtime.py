"""The process and its surroundings: what torchrun says, the device, the screen and the log."""

import os
from pathlib import Path
from typing import TextIO, cast

import pytest

from launch.exit_status import Status
from launch.runtime import ALONE, RedirectedOutput, Screen, choose_device, import_path, world
from launch.train import main
from tests.ranks import run_ranks
from trainer.monitoring.progress import Progress

CONTRADICTIONS = [
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE = 2 is set but RANK is not"),
    ({"WORLD_SIZE": "abc"}, "the environment has WORLD_SIZE = 'abc', not a number of ranks"),
    ({"WORLD_SIZE": "0"}, "WORLD_SIZE = '0', not a number of ranks"),
    ({"RANK": "-1"}, "RANK = '-1', not a number"),
    ({"RANK": "1"}, "RANK = 1 is set and WORLD_SIZE and MASTER_ADDR and MASTER_PORT are not"),
    ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "RANK = 0 is set and MASTER_PORT is not"),
    ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK = 2 and WORLD_SIZE = 2 contradict"),
    ({"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK = 3 and LOCAL_WORLD_SIZE = 2 contradict"),
    ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
     "LOCAL_WORLD_SIZE = 8 and WORLD_SIZE = 2 contradict"),
]  # fmt: skip


@pytest.mark.parametrize(("variables", "wanted"), CONTRADICTIONS)
def test_launcher_variables_that_contradict_each_other_are_named(
    variables, wanted, monkeypatch, configuration, capsys, tmp_path
):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"RANK|WORLD_SIZE"):
        world()
    assert main([configuration]) == Status.MISTAKE
    said = capsys.readouterr().err
    assert wanted in said and said.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_lone_rank_needs_no_address(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert world().launched


def test_a_screen_that_is_gone_ends_nothing():
    read, write = os.pipe()
    os.close(read)
    screen = Screen(write, "ascii")
    print("Grüße", file=screen, flush=True)
    assert screen.fileno() == write and not screen.isatty()
    os.close(write)


def _print(rank: int, world_size: int, folder: str) -> str:
    os.dup2(os.open(f"{folder}/screen", os.O_WRONLY | os.O_CREAT), 2)
    output = RedirectedOutput()
    os.system("echo from C 1>&2")
    print("early", flush=True)
    before = sorted(path.name for path in Path(folder).iterdir())
    output.to_log(Path(folder) / "logs/rank-0.log")
    print("late", flush=True)
    print("seen", file=output.screen, flush=True)
    return " ".join(before)


@pytest.mark.parametrize(("encoding", "shown"), [("ascii", r"l\xe4ufe \U0001f600"), ("latin-1", r"läufe \U0001f600")])
def test_a_screen_shows_what_its_encoding_lacks_as_escapes(encoding: str, shown: str):
    """Of a run's lines, on a screen that is no terminal and in the live line's place."""
    read, write = os.pipe()
    progress = Progress(2, 8, cast(TextIO, Screen(write, encoding)))
    progress.line("läufe 😀")
    os.close(write)
    assert os.read(read, 100).decode(encoding) == f"{shown}\n"
    os.close(read)


def test_what_is_printed_before_the_run_is_sure_to_start_comes_into_the_log_then(tmp_path: Path):
    assert run_ranks(_print, 1, str(tmp_path)) == ["screen"]
    assert (tmp_path / "screen").read_text() == "seen\n"
    assert (tmp_path / "logs/rank-0.log").read_text().splitlines() == ["from C", "early", "late"]


def test_ranks_import_nothing_from_the_working_directory():
    assert import_path()["PYTHONSAFEPATH"] == "1"


def test_an_unknown_device_names_the_legal_ones():
    with pytest.raises(ValueError, match="'tpu' is unknown; legal: auto, cpu, cuda"):
        choose_device("tpu", ALONE)
    assert choose_device("cpu", ALONE).type == "cpu"
