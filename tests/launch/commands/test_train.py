"""Which rank `tiglon train --nproc` blames, and a signal that Python drops. Whole runs: test_run_end.py above."""

import os
import signal
import time

import pytest

from launch.commands.torchrun import SignalException
from launch.commands.train import _root_cause, _SignalHandlers


class Failure:
    """What torchrun says of a rank."""

    def __init__(self, exitcode: int, timestamp: int = 7):
        self.exitcode, self.timestamp = exitcode, timestamp


@pytest.mark.parametrize(
    ("codes", "guilty"),
    [
        ({0: 1, 1: -9}, 1),  # killed; the other lost its connection
        ({0: -15, 1: 1}, 1),  # torchrun ends those that are left
        ({0: 1, 1: 75}, 1),  # hung
        ({0: 2, 1: -15}, 0),
        ({0: -9, 1: -9}, 0),
    ],
)
def test_the_rank_that_is_to_blame(codes: dict[int, int], guilty: int):
    assert _root_cause({rank: Failure(code) for rank, code in codes.items()})[0] == guilty  # type: ignore[dict-item]


def test_a_rank_that_ended_seconds_later_is_not_to_blame():
    assert _root_cause({0: Failure(1, 7), 1: Failure(-9, 9)})[0] == 0  # type: ignore[dict-item]
    assert _root_cause({0: Failure(1, 7), 1: Failure(-9, 8)})[0] == 1, "within a second: whole seconds say no more"  # type: ignore[dict-item]


def test_a_signal_that_comes_while_an_object_is_freed_is_forwarded():
    class Freed:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            sum(range(10000))

    with pytest.raises(SignalException), _SignalHandlers(None):  # type: ignore[arg-type]  # asked at a second signal
        Freed()
        time.sleep(10)
