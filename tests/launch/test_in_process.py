"""Training inside a program of the user's: what it leaves as it was, and how it ends."""

import subprocess
from pathlib import Path

import pytest

from tests.test_tiglon import python

PRELUDE = """
import gc, io, logging, os, signal, sys, threading, time, warnings
import torch
import launch.in_process, launch.train
from launch.load_config import load_config
from launch.in_process import train_here

def process():
    gc.collect()
    streams = [os.readlink(f"/proc/self/fd/{number}") for number in (1, 2)]
    handlers = [signal.getsignal(number) for number in signal.valid_signals() if number not in (signal.SIGKILL, signal.SIGSTOP)]
    root = logging.getLogger()
    return {
        "streams": (sys.stdout, sys.stderr, streams), "signals": handlers, "environment": set(os.environ.items()),
        "warnings": list(warnings.filters), "logging": (list(root.handlers), root.level), "excepthook": sys.excepthook,
        "torch": (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), torch.distributed.is_initialized()),
        "threads": [thread.name for thread in threading.enumerate()],
    }

def changed(before):
    return {
        name: value ^ before[name] if name == "environment" else (before[name], value)
        for name, value in process().items() if before[name] != value
    }

def open_files():
    return len(os.listdir("/proc/self/fd"))

def train(*overrides):
    return train_here(load_config(CONFIGURATION, overrides))

whole = launch.train.train

def when_training_begins(action):
    launch.train.train = lambda session, state: (action(), whole(session, state))[1]
"""


def script(configuration: str, text: str) -> subprocess.CompletedProcess:
    return python(f"CONFIGURATION = {configuration!r}\n{PRELUDE}\n{text}", Path(configuration).parent)


def test_the_process_is_as_before_and_trains_again(configuration: str, tmp_path: Path):
    done = script(
        configuration,
        """
logging.getLogger().addHandler(logging.NullHandler())
before = process()
print(train("run.dir=one", "run.deterministic=true"))
assert not changed(before), changed(before)
files = open_files()
print(train("run.dir=two"), train("run.dir=two"))
assert not changed(before) and open_files() == files
""",
    )
    assert done.returncode == 0, done.stderr
    ends = [f"(12, '{name}/checkpoints/step-00000012')" for name in ("one", "two", "two")]
    assert done.stdout.split("\n") == [ends[0], " ".join(ends[1:]), ""]
    assert done.stderr.count("step 12/12") == 2 and "done: two has all 12 steps" in done.stderr
    assert "untested optimizer" in (tmp_path / "one/logs/rank-0.log").read_text()
    one, two = (tmp_path / name / "checkpoints/step-00000012/rank-00000.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_the_streams_of_a_notebook_get_our_lines_alone(configuration: str):
    """They write to no descriptor."""
    done = script(
        configuration,
        """
class Cell(io.StringIO):
    encoding = "utf-8"
sys.stdout, sys.stderr = cells = Cell(), Cell()
train("train.steps=2")
assert (sys.stdout, sys.stderr) == cells
sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
print(cells[1].getvalue(), end="")
assert not cells[0].getvalue()
""",
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "step 2/2" in done.stdout and "untested optimizer" not in done.stdout


def test_a_failure_is_an_exception(configuration: str, tmp_path: Path):
    done = script(
        configuration,
        """
from trainer.session import RunEnded
before = process()
try:
    train("data.train=nowhere")
except FileNotFoundError as error:
    print(error)
def fail():
    raise ArithmeticError("planted")
when_training_begins(fail)
try:
    train()
except RunEnded as error:
    print(error)
assert not changed(before), changed(before)
""",
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "nowhere" in lines[0] and len(lines) == 2 and "tiglon:" not in done.stderr
    assert (
        lines[1].startswith("step 0: ArithmeticError: planted; ") and f"traceback in {tmp_path}/run/logs/rank-0.log" in lines[1]
    )
    assert "ArithmeticError: planted" in (tmp_path / "run/logs/rank-0.log").read_text()


def test_a_mistake_that_the_checkpoint_shows_is_raised_as_itself(configuration: str):
    done = script(
        configuration,
        """
train("train.steps=2")
try:
    train("model.hidden_size=64")
except ValueError as error:
    print(error)
""",
    )
    assert "its model.hidden_size is 32, this run's 64" in done.stdout and done.stdout.count("\n") == 1, done.stderr


def test_the_first_ctrl_c_saves_and_a_second_one_does_not_wait(configuration: str, tmp_path: Path):
    done = script(
        configuration,
        """
before = process()
when_training_begins(lambda: os.kill(os.getpid(), signal.SIGINT))
try:
    train("run.dir=first", "train.steps=2000")
except KeyboardInterrupt as error:
    print(error)
def twice():
    for pause in (0.3, 20):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(int(pause / 0.01)):
            time.sleep(0.01)
when_training_begins(twice)
began = time.monotonic()
try:
    train("run.dir=second", "train.steps=2000")
except KeyboardInterrupt as error:
    assert not str(error) and time.monotonic() - began < 10
assert not changed(before), changed(before)

""",
    )
    assert done.returncode == 0, done.stderr
    assert "training was stopped at step" in done.stdout and "is saved in first/checkpoints/step-" in done.stdout
    assert (tmp_path / "first/stopped").exists() and not (tmp_path / "second/stopped").exists()
    assert "left at once by a second SIGINT" in done.stderr


GROUP = """
from torch.distributed import HashStore, init_process_group
init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
"""


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (f"{GROUP}train()", "torch.distributed is initialized in this process already"),
        ("threading.Thread(target=train).start()", "training was started in another thread than the main one"),
    ],
)
def test_where_it_cannot_train_it_says_so(configuration: str, call: str, sentence: str):
    done = script(configuration, call)
    assert f"ValueError: {sentence}" in done.stderr
    assert not Path(configuration).with_name("run").exists()


def test_ranks_of_torchrun_train_one_run(configuration: str, tmp_path: Path):
    program = tmp_path / "program.py"
    program.write_text(f'import tiglon\nprint(f"{{tiglon.train({configuration!r}).step}}\\n", end="")\n')
    start = "from torch.distributed.run import main; main(['--standalone', '--nproc-per-node=2', 'program.py'])"
    done = python(start, tmp_path)
    assert done.returncode == 0 and done.stdout.split() == ["12", "12"], done.stderr
    assert "2 x cpu: tensor 1, data 2" in done.stderr and done.stderr.count("step 12/12") == 1
