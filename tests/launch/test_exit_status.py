"""The table of exit statuses in docs/operate.md, line by line."""

import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.checkpoints import find_checkpoint, verify_checkpoint
from launch.commands.train import train_command
from launch.exit_status import Status, was_stopped
from tests.launch.test_run_end import LONG, Command
from tests.launch.test_train import ENVIRONMENT
from trainer.monitoring import watchdog

ROOT = Path(__file__).parent.parent.parent
TABLE = re.findall(
    r"^\| (\d+|128 \+ n) \| ([^|]*) \| ([^|]*) \| ([^|]*) \|$", (ROOT / "docs/operate.md").read_text(), re.MULTILINE
)


def faulty(fault: str, *arguments: str) -> tuple[int, str]:
    """`launch.train` in a process of its own, with a fault of tests/launch/faults.py."""
    program = (
        "import sys; from pathlib import Path; from launch.train import main; from tests.launch.faults import Fault, inject\n"
    )
    program += f"inject({fault}, Path('.')); sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stderr


def all_done(configuration: str, run: Path) -> tuple[int, str]:
    command = Command(configuration)
    status = command.end()
    assert f"done: {run} has all 12 steps; saved in {find_checkpoint(run)}\n" in command.screen
    verify_checkpoint(find_checkpoint(run))
    return status, command.screen


def failed(configuration: str, run: Path) -> tuple[int, str]:
    status, screen = faulty("Fault('slow', 5, delay_seconds='not a number')", configuration)
    newest = find_checkpoint(run)
    assert re.search(rf"^tiglon: step 6: TypeError: .*the newest complete .*{newest}; traceback in {run}/logs/rank-0.log$",
                     screen, re.MULTILINE)  # fmt: skip
    return status, screen


def mistaken(configuration: str, run: Path) -> tuple[int, str]:
    command = Command(configuration, "train.stesp=3")
    status = command.end()
    assert command.screen.count("\n") == 1 and not run.exists()
    return status, command.screen


def hung(configuration: str, run: Path) -> tuple[int, str]:
    status, screen = faulty("Fault('slow', 5, delay_seconds=100)", configuration, "health.hang_seconds=3")
    assert "no progress for" in screen and f"the newest complete checkpoint is {find_checkpoint(run)}" in screen
    assert "Current thread" in (run / "logs/rank-0.log").read_text() or "Thread" in (run / "logs/rank-0.log").read_text()
    return status, screen


def stopped(configuration: str, run: Path) -> tuple[int, str]:
    command = Command(configuration, *LONG)
    command.read_until("checkpoint of step 20 complete")
    command.process.send_signal(signal.SIGTERM)
    status = command.end()
    assert re.search(
        rf"^stopped by SIGTERM at step \d+; saved in {find_checkpoint(run)}; the same command resumes$",
        command.screen,
        re.MULTILINE,
    )
    assert was_stopped(run)
    return status, command.screen


def killed(configuration: str, run: Path) -> tuple[int, str]:
    command = Command(configuration, *LONG, "--nproc", "2")
    command.read_until("checkpoint of step 20 complete")
    command.ranks()[0].kill()
    status = command.end()
    assert "tiglon: rank 0 was killed (SIGKILL)" in command.screen
    assert status == 128 + signal.SIGKILL
    return status, command.screen


SCENARIOS: dict[str, Callable[[str, Path], tuple[int, str]]] = {
    "0": all_done, "1": failed, "2": mistaken, "75": hung, "85": stopped, "128 + n": killed,
}  # fmt: skip


def test_the_table_has_every_status():
    assert [row[0] for row in TABLE] == list(SCENARIOS)
    assert {int(row[0]) for row in TABLE[:-1]} | {Status.INTERRUPTED} == set(Status)
    assert Status.HUNG == watchdog.EXIT_STATUS
    assert "130: a second Ctrl-C" in TABLE[-1][1] and "137: a rank was killed" in TABLE[-1][1]
    assert train_command.__doc__ is not None and "85 stopped by a signal and saved" in train_command.__doc__


@pytest.mark.slow
@pytest.mark.parametrize("row", TABLE, ids=lambda row: row[0])
def test_a_line_of_the_table(row: tuple[str, str, str, str], configuration: str, tmp_path: Path):
    """The status is that of the line; what it advises works: the same command comes to its end."""
    status, screen = SCENARIOS[row[0]](configuration, tmp_path / "run")
    assert "Traceback" not in screen
    if row[0] != "128 + n":
        assert status == int(row[0])
    if "the same command resumes" in row[3]:
        again = Command(configuration, "train.steps=20" if row[0] in ("85", "128 + n") else "train.steps=12")
        assert again.end() == Status.DONE and "resumed from" in again.screen
