"""`python -m benchmarks.gpu`: benchmarks/gpu/command.py says what it does."""

import os
import signal
import sys


def interrupt(*_: object) -> None:
    """Ctrl-C while torch is imported, which takes seconds and aborts at a KeyboardInterrupt; nothing else is there yet."""
    print("tiglon: interrupted", file=sys.stderr, flush=True)
    os._exit(130)


before = signal.getsignal(signal.SIGINT)
if before is signal.default_int_handler:  # else it is ignored, as under nohup
    signal.signal(signal.SIGINT, interrupt)

from benchmarks.gpu.command import main  # noqa: E402
from launch import program  # noqa: E402

signal.signal(signal.SIGINT, before)
if __name__ == "__main__":
    program.leave(program.run(main))
