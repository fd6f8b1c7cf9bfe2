"""Runs a command for as long as somebody holds our standard input open, and leaves nothing behind that it started.

    python -m benchmarks.gpu.supervisor COMMAND ...

The kernel closes the other end of our input when its process is killed. What loses its parent below us becomes our child
(Linux), in whatever session it is: so everything is found. The status is the command's, 128 + N for a signal N.
"""

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from launch.interrupts import LAUNCHER

_PR_SET_CHILD_SUBREAPER = 36
PATIENCE_SECONDS = 20
"""Seconds to wait for killed processes; one that hangs in a driver may never end."""


def supervise(command: list[str]) -> int:
    """Run it to its end or to that of our input."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # who sends it to every process of ours sends it to the one above us too
    environment = {**os.environ, LAUNCHER: str(os.getpid())}
    process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)
    status = None
    while status is None and not select.select([sys.stdin], [], [], 0.1)[0]:
        status = reap(process.pid)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (left := children()) and time.monotonic() < deadline:
        for one in left:
            with suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)
        time.sleep(0.01)
        reap(process.pid)
    code = -signal.SIGKILL if status is None else os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def reap(command: int) -> int | None:
    """Reap children that have ended; the status of the command, if it is among them."""
    found = None
    with suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            found = ended[1] if ended[0] == command else found
    return found


def children() -> list[int]:
    """Our own, those that have ended and were not let go of among them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            if int(path.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.append(int(path.parent.name))
    return found


if __name__ == "__main__":
    sys.exit(supervise(sys.argv[1:]))
