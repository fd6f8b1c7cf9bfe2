"""`python -m launch` is the program `tiglon`, from its first import on."""

import subprocess
import sys

import pytest

from tests.launch.test_train import ENVIRONMENT

EARLY = """
import os, runpy, signal, sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "launch.cli":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
{environment}
runpy.run_module("launch", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("environment", "said"),
    [("", "tiglon: interrupted\n"), ("import os; os.environ['TIGLON_LAUNCHER'] = str(os.getppid())", "")],
    ids=["alone", "a rank, whose launcher says it"],
)
def test_ctrl_c_during_the_first_import_is_one_sentence(environment: str, said: str):
    command = [sys.executable, "-c", EARLY.format(environment=environment)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (130, said)


def test_it_is_the_program():
    done = subprocess.run(
        [sys.executable, "-m", "launch", "--help"], env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0 and "Usage: tiglon" in done.stdout
