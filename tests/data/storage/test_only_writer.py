"""Two processes and one directory."""

import subprocess
import sys
import time
from contextlib import ExitStack

import pytest

from data.storage import only_writer

HOLDER = """
import sys, time
from data.storage import only_writer
with only_writer(sys.argv[1], "--output"):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_of_two_processes_one_is_refused_until_the_other_ends(tmp_path):
    folder = tmp_path / "a" / "b"
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match=rf"--output '.*/b' is being written by another command \(process {other.pid} on "):
            only_writer(str(folder), "--output").__enter__()
        other.kill()
    assert (folder / ".lock").exists()  # of the one that was killed
    with only_writer(str(folder), "--output"), pytest.raises(ValueError, match="being written"):
        only_writer(f"file://{folder}", "--output").__enter__()
    assert not list(folder.iterdir())


def test_what_was_written_stays(tmp_path):
    with only_writer(str(tmp_path / "new"), "--output"):
        (tmp_path / "new" / "x").write_text("x")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x"]


def test_many_that_come_and_go_are_never_there_together(tmp_path):
    """Each removes the lock file when it leaves, which another may just have opened."""
    program = """
import sys, time
from data.storage import only_writer
from pathlib import Path
entered = 0
while entered < 40:
    try:
        with only_writer(sys.argv[1], "--output"):
            inside = Path(sys.argv[2])
            inside.open("x").close()
            inside.unlink()
            entered += 1
    except ValueError:
        pass
"""
    with ExitStack() as stack:
        arguments = [sys.executable, "-c", program, str(tmp_path / "held"), str(tmp_path / "inside")]
        running = [stack.enter_context(subprocess.Popen(arguments)) for _ in range(3)]
        limit = time.monotonic() + 60
        assert [process.wait(limit - time.monotonic()) for process in running] == [0, 0, 0]


def test_a_directory_that_cannot_be_made_is_an_error_with_its_name(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file/x"):
        only_writer(str(tmp_path / "file" / "x"), "--output").__enter__()
