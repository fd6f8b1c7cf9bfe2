"""Stop signals set a value and nothing else; the second one that a person types is told at once."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model.parallel.mesh import Mesh, make_mesh
from tests.ranks import run_ranks
from trainer.monitoring.signals import ECHO_SECONDS, SIGNALS, StopSignal, StopVote

ROOT = Path(__file__).parent.parent.parent.parent


def wait_for(found: Callable[[], object]) -> None:
    """The thread that listens is another one."""
    end = time.monotonic() + 10
    while not found():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_stop_signal_is_remembered_by_name(number: signal.Signals):
    with StopSignal() as stop:
        assert stop.requested is None
        os.kill(os.getpid(), number)
        wait_for(lambda: stop.requested)
        assert stop.requested == number.name


def test_the_first_signal_counts():
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        wait_for(lambda: stop.requested)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        assert stop.requested == "SIGUSR1"


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_of_a_person_means_now(first: signal.Signals):
    heard, left = [], []
    with StopSignal(heard=heard.append, leave=left.append) as stop:
        os.kill(os.getpid(), first)
        wait_for(lambda: stop.requested)
        time.sleep(2 * ECHO_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)  # a scheduler may repeat itself
        os.kill(os.getpid(), signal.SIGINT)
        wait_for(lambda: left)
    assert left == ["SIGINT"]
    assert heard == (["SIGINT"] if first == signal.SIGINT else []), "what a machine sends needs no answer"


def test_the_first_signal_here_is_no_second_where_another_rank_heard_it_before():
    left = []
    with StopSignal(leave=left.append) as stop:
        stop.request("SIGINT")
        time.sleep(2 * ECHO_SECONDS)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
    assert left == []


def test_one_key_that_arrives_twice_is_one():
    left = []
    with StopSignal(leave=left.append) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        wait_for(lambda: stop.requested)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
    assert left == []


def test_the_end_of_the_grace_period_is_told_once_also_when_another_rank_heard_the_signal():
    late = []
    with StopSignal(grace_seconds=0.1, late=lambda: late.append(1)) as stop:
        stop.request("SIGUSR1")
        wait_for(lambda: late)
        time.sleep(0.3)
    assert late == [1]


def test_a_hangup_stays_ignored_under_nohup():
    program = "import os, signal, time; from trainer.monitoring.signals import StopSignal\n"
    program += "with StopSignal() as stop:\n os.kill(os.getpid(), signal.SIGHUP); time.sleep(0.2); print(stop.requested)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["nohup", sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "None"


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopSignal():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


def asked(rank: int, world_size: int) -> list[bool]:
    stop = StopSignal()
    vote = StopVote(stop, make_mesh(1, torch.device("cpu")))
    answers = [vote.requested(), vote.requested(wait=False)]
    if rank == 1:
        stop.request("SIGTERM")
    return [*answers, vote.requested(wait=False), vote.requested(wait=False), vote.requested(), stop.requested == "SIGTERM"]


def test_a_stop_of_one_rank_reaches_all_in_the_same_call():
    assert run_ranks(asked, 2) == [[False, False, False, True, True, True]] * 2
    alone = StopSignal()
    assert not StopVote(alone, Mesh()).requested()
    alone.request("SIGINT")
    assert StopVote(alone, Mesh()).requested() and StopVote(alone, Mesh()).requested(wait=False)
