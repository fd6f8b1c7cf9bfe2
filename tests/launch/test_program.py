"""How the program ends: with one sentence and a status, whatever happened."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launch.program import memory_asked, status_and_sentence
from tests.launch.commands.test_checkpoint import a_run  # noqa: F401 (a fixture)

ROOT = Path(__file__).parent.parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}


def tiglon(*arguments: object, **options: Any) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "launch", *map(str, arguments)]
    return subprocess.run(
        command, env=ENVIRONMENT, text=True, timeout=60, check=False, **{"stderr": subprocess.PIPE, **options}
    )


def shell(line: str) -> subprocess.CompletedProcess:
    """A line of bash in which $tiglon is the program; the status is that of the first of a pipe's programs."""
    environment = {**ENVIRONMENT, "tiglon": f"{sys.executable} -m launch"}
    line = f"{line}; exit ${{PIPESTATUS[0]}}"
    return subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("train", "--nproc", "abc", "x.toml"), "(got 'abc'); see tiglon train --help"),
        (("report",), "missing argument 'runs'; see tiglon report --help"),
        (("trian",), "no such command 'trian', did you mean 'train'; see tiglon --help"),
        (("checkpoint", "lst", "x"), "no such command 'lst', did you mean 'list'; see tiglon checkpoint --help"),
        (("report", "--bogus"), "no such option: --bogus; see tiglon report --help"),
        (("prepare", "x", "--tokenizer", "y", "--output", "z", "--workers=two"), "(got 'two'); see tiglon prepare --help"),
        (("prepare", "x", "--on-error", "z"), "'z' is not one of 'stop', 'skip'; see tiglon prepare --help"),
    ],
)
def test_a_mistyped_command_line_is_one_sentence(arguments: tuple[str, ...], sentence: str):
    done = tiglon(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("tiglon: ") and sentence in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(("arguments", "status"), [((), 2), (("--help",), 0), (("report", "--help"), 0), (("checkpoint",), 2)])
def test_help_is_still_help(arguments: tuple[str, ...], status: int):
    done = tiglon(*arguments, stdout=subprocess.PIPE)
    assert done.returncode == status and "Usage: tiglon" in done.stdout + done.stderr and "tiglon:" not in done.stderr


@pytest.mark.parametrize(
    ("module", "seconds"),
    [("typer.core", 0), ("numpy", 0), ("queue", 0.0005), ("queue", 0.0015), ("torch.nn", 0), ("launch.config", 0)],
)
def test_ctrl_c_is_told_at_any_moment_of_the_start(module: str, seconds: float, tmp_path: Path):
    """Python tells of each module as it has imported it; the signal is sent so long after it. After `queue`, torch's C++ code
    sets up its collectives, and would abort at an exception."""
    command = [sys.executable, "-X", "importtime", "-m", "launch", "evaluate", str(tmp_path)]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    while process.stderr.readline().split()[-1:] != [module]:
        assert process.poll() is None
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    told = process.communicate(timeout=60)[1].splitlines()
    assert [line for line in told if not line.startswith("import time:")] == ["tiglon: interrupted"]
    assert process.returncode == 130


@pytest.mark.parametrize("seconds", [0.1, 0.3, 1.0], ids="after {} s".format)
def test_ctrl_c_ends_a_preparation_and_its_workers(tmp_path: Path, corpus: Path, seconds: float):
    """From a terminal it reaches the workers too; none of them shows a traceback, none is waited for."""
    (tmp_path / "text.txt").write_text("def x(): return 1\n" * 2_000_000)
    arguments = ["prepare", "text.txt", "--tokenizer", f"{corpus}/tokenizer", "--output", "out", "--workers", "2"]
    arguments += ["--text-documents", "line", "--task-bytes", "18000000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "launch", *arguments], cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    while not (tmp_path / "out/plan.json").exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)
    sent = time.monotonic()
    assert (process.communicate(timeout=60)[1], process.returncode) == ("tiglon: interrupted\n", 130)
    assert time.monotonic() - sent < 5
    with pytest.raises(ProcessLookupError):
        while time.monotonic() - sent < 5:
            os.killpg(process.pid, 0)
            time.sleep(0.05)


def test_a_reader_who_has_enough_ends_the_program_quietly(a_run: Path):  # noqa: F811
    for line in (
        f"$tiglon checkpoint list {a_run} | head -c 1 >/dev/null",
        f"$tiglon checkpoint verify {a_run} | true",
        "$tiglon --help | true",
    ):
        done = shell(line)
        assert done.stderr == "" and done.returncode in (0, 1), line


def test_a_reader_who_leaves_a_text_ends_it_quietly(run_directory: Path):
    for line in (
        f"$tiglon generate {run_directory} --prompt 'def return' --device cpu | head -c 1",
        f"$tiglon evaluate {run_directory} --device cpu 2>&1 | true",
    ):
        done = shell(line)
        assert done.stderr == "" and done.returncode in (0, 1), line


def test_an_output_that_cannot_be_written_is_told(a_run: Path):  # noqa: F811
    for command in ("list", "verify"):
        done = shell(f"$tiglon checkpoint {command} {a_run} >/dev/full")
        assert done.returncode == 1
        assert done.stderr == "tiglon: standard output: No space left on device; make room there and run the same again\n"


def test_what_nobody_foresaw_keeps_its_traceback_in_a_file(tmp_path: Path):
    ask = "from launch import program; program.run(lambda: {}['a key\\nin two lines'])"
    for place, kept in ((tmp_path, True), (Path("/nowhere"), False)):
        environment = {**ENVIRONMENT, "TMPDIR": str(place)}
        done = subprocess.run([sys.executable, "-c", ask], env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1 and done.stderr.count("\n") == 1
        assert done.stderr.startswith("tiglon: KeyError: 'a key\\nin two lines'; the traceback is in ")
        path = Path(done.stderr.split()[-1])
        assert (path.parent == tmp_path) == kept
        assert "Traceback" in path.read_text() and "program.py" in path.read_text()
        path.unlink()


def mapped(kind: Callable[[], Any]) -> tuple[int, str]:
    try:
        kind()
    except BaseException as error:
        return status_and_sentence(error)
    raise AssertionError("nothing was raised")


def test_want_of_memory_says_what_was_asked_for():
    wanted = 1 << 50
    for ask, amount in (
        (lambda: torch.empty(wanted, dtype=torch.uint8), "1,048,576.00 GiB"),
        (lambda: np.empty(wanted, np.uint8), "1.00 PiB"),
    ):
        assert mapped(ask) == (
            1,
            f"out of memory ({amount} of host memory asked for at once); ask for less, or run it where there is more",
        )
    assert mapped(lambda: bytearray(wanted))[1].startswith("out of memory; ask for less")


def test_errors_of_the_system_name_their_file(tmp_path: Path):
    (tmp_path / "file").touch()
    assert mapped((tmp_path / "no").read_text) == (2, f"{tmp_path}/no: No such file or directory")
    assert mapped(lambda: os.listdir(tmp_path / "file")) == (2, f"{tmp_path}/file: Not a directory")
    assert mapped(lambda: os.setxattr(tmp_path / "file", "bad", b""))[0] == 1
    assert mapped(lambda: int("x")) == (2, "invalid literal for int() with base 10: 'x'")


LEFT = """
import atexit, ctypes, threading, time, torch
from launch import program

def work():
    while True:
        square @ square

def act():
    for _ in range(4):
        threading.Thread(target=work, daemon=True).start()
    ctypes.CDLL(None).printf(b"by C\\n")
    atexit.register(print, "at exit")
    threading.Thread(target=lambda: (time.sleep(0.2), print("by a thread"))).start()
    return 3

square = torch.ones(300, 300)
program.run(act)
"""


def test_a_thread_inside_torch_does_not_abort_the_end():
    """As Python's own end does. What that waits for, calls and flushes is waited for, called and flushed."""
    done = subprocess.run(
        [sys.executable, "-c", LEFT], env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (3, "")
    assert sorted(done.stdout.splitlines()) == ["at exit", "by C", "by a thread"]


def test_an_interrupt_that_a_library_swallows_is_an_interrupt():
    """numpy under torch does: its import, cut off, is tried again and fails as "cannot load module more than once"."""
    ask = """
import os, signal
from launch import program
def act():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        sum(range(10000))
    except BaseException:
        pass
    raise ImportError("cannot load module more than once per process")
program.run(act)
"""
    done = subprocess.run([sys.executable, "-c", ask], env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (130, "tiglon: interrupted\n")
    ignoring = f"trap '' INT; exec {sys.executable} -c '{ask}'"
    done = subprocess.run(["bash", "-c", ignoring], env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and "ImportError: cannot load" in done.stderr, "nohup, or a job in the background"
    Path(done.stderr.split()[-1]).unlink()


def test_an_interrupt_under_another_error_is_an_interrupt():
    def interrupted() -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise ImportError("initialization failed") from error

    assert mapped(interrupted) == (130, "interrupted")


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.10 GiB"),
         " (20.00 MiB of GPU memory asked for at once)"),
        (MemoryError("Unable to allocate 3.5 GiB for an array with shape (7,)"), " (3.5 GiB of host memory asked for at once)"),
        (MemoryError(), ""),
        (OSError(12, "Cannot allocate memory"), ""),
        (RuntimeError("shape mismatch"), None),
    ],
)  # fmt: skip
def test_the_size_of_an_allocation_is_read_off_the_error(error: Exception, wanted: str | None):
    assert memory_asked(error) == wanted


NO_UTF8 = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
"""The locale of many containers and cron jobs, on a Python that is told not to take UTF-8 for it."""


@pytest.mark.parametrize(
    ("environment", "shown"),
    [
        ({"PYTHONIOENCODING": "ascii"}, r"\xe9 \u6570 \U0001f600"),
        (NO_UTF8, r"\xe9 \u6570 \U0001f600"),
        ({"PYTHONIOENCODING": "latin-1"}, r"é \u6570 \U0001f600"),
        ({"PYTHONIOENCODING": "ascii:replace"}, "? ? ?"),
        ({"PYTHONIOENCODING": "utf-8"}, "é 数 😀"),
        ({"LC_ALL": "POSIX"}, "é 数 😀"),
    ],
    ids=["ascii", "POSIX", "latin-1", "replace", "utf-8", "POSIX as UTF-8"],
)
def test_a_character_that_the_screen_cannot_show_is_an_escape(environment: dict[str, str], shown: str):
    """From print and from rich, and in the sentence on stderr. (typer.echo writes UTF-8 where the encoding is ASCII.)"""
    script = """
from launch import program
from launch.terminal import terminal
text = "\\xe9 \\u6570 \\U0001f600"
def say():
    print(text); terminal().print(text)
    raise ValueError(text)
program.run(say)
"""
    clean = {
        name: value for name, value in ENVIRONMENT.items() if not name.startswith(("LC_", "LANG", "PYTHONIO", "PYTHONUTF8"))
    }
    done = subprocess.run([sys.executable, "-c", script], env=clean | environment, capture_output=True, timeout=60, check=False)
    encoding = "latin-1" if "latin-1" in environment.values() else "utf-8"
    assert done.stdout.decode(encoding).splitlines() == [shown] * 2
    assert (done.returncode, done.stderr.decode(encoding)) == (2, f"tiglon: {shown if '?' not in shown else ESCAPED}\n")


ESCAPED = r"\xe9 \u6570 \U0001f600"
"""Python's own handler for stderr stays."""


@pytest.mark.slow
def test_a_run_named_in_letters_that_the_screen_lacks(configuration: str, tmp_path: Path):
    """Trained, resumed, generated from and reported."""
    environment = ENVIRONMENT | {"PYTHONIOENCODING": "ascii"}
    run = tmp_path / "läufe"

    def tiglon_says(*arguments: object) -> str:
        command = [sys.executable, "-m", "launch", *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return (done.stdout + done.stderr).decode("ascii")

    train = ["train", configuration, f"run.dir={run}", "log.sample_prompt=déf", "train.steps=4"]
    assert "l\\xe4ufe has all 4 steps" in tiglon_says(*train)
    assert "l\\xe4ufe has all 4 steps" in tiglon_says(*train), "resumed"
    assert tiglon_says("generate", run, "--prompt", "déf ", "--tokens", 8).startswith("d\\xe9f ")
    assert "l\\xe4ufe/report" in tiglon_says("report", run)
    sample = [record for record in map(json.loads, (run / "metrics.jsonl").read_text("utf-8").splitlines()) if "text" in record]
    assert sample and sample[0]["text"].startswith("déf")
