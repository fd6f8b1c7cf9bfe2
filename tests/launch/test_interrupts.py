"""Ctrl-C at moments when Python cannot raise an exception."""

import subprocess
import sys

import pytest

from tests.launch.test_train import ENVIRONMENT

FREED = """
import os, signal, time
from launch import program
from launch.interrupts import interrupts_end_at_once

class Freed:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        sum(range(10000))

def act():
    {act}
    time.sleep(10)

program.run(act)
"""


@pytest.mark.parametrize(
    ("act", "said"),
    [
        ("Freed()", "tiglon: interrupted\n"),
        ("with interrupts_end_at_once('interrupted early'): Freed()", "tiglon: interrupted early\n"),
        ("with interrupts_end_at_once(''): Freed()", ""),
    ],
)
def test_one_that_comes_while_an_object_is_freed_is_one_sentence(act: str, said: str):
    """Python would print "Exception ignored in", and nothing else would happen."""
    command = [sys.executable, "-c", FREED.format(act=act)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (130, said)
