"""What `tiglon train` relies on in torch.distributed.elastic. Each test fails with one sentence where torch has changed."""

import importlib
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
import torch.distributed.run
from torch.distributed.elastic.multiprocessing import api, errors
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

from launch.commands import torchrun

OPTIONS = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--rdzv-id=x", "--nproc-per-node=2", "--no-python", "sh"]


def changed(what: str) -> str:
    """The sentence for a difference."""
    return f"torch {torch.__version__} has changed: {what}; adapt launch/commands/torchrun.py"


def name_changes() -> str:
    """The first name that torchrun.py imports and torch no longer has; "" if all are there."""
    for module, name in (
        ("torch.distributed.run", "parse_args"),
        ("torch.distributed.elastic.agent.server.local_elastic_agent", "LocalElasticAgent"),
        ("torch.distributed.run", "run"),
        ("torch.distributed.elastic.multiprocessing.api", "SignalException"),
        ("torch.distributed.elastic.multiprocessing.errors", "ChildFailedError"),
        ("torch.distributed.elastic.multiprocessing.errors", "ProcessFailure"),
        ("torch.distributed.elastic.multiprocessing.subprocess_handler", "SubprocessHandler"),
    ):
        try:
            getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            return changed(f"{module} has no {name}")
    return ""


def failure_changes() -> str:
    """What is other than expected of two ranks of which one leaves with status 3; "" if nothing is."""
    began, told = int(time.time()), list[Any]()
    try:
        ended: Any = torchrun.run_torchrun([*OPTIONS, "-c", "exit $((RANK * 3))"], told.append)
    except Exception as error:
        return changed(f"a rank that fails ends run as {type(error).__name__}, expected ChildFailedError")
    if not isinstance(ended, dict) or set(ended) != {1}:
        return changed(f"ChildFailedError.failures is {ended}, expected the failure of rank 1 alone")
    if [[*failures] for failures in told] != [[1]]:
        return changed(f"LocalElasticAgent._monitor_workers has told of {told}, expected the failure of rank 1, once")
    code, second = ended[1].exitcode, ended[1].timestamp
    if code != 3 or not began <= second <= time.time():
        return changed(f"ProcessFailure has exitcode {code} and timestamp {second}, expected 3 and the time in seconds")
    return ""


def start_changes(folder: Path) -> str:
    """What is other than expected of the signals that two ranks hold back when they start; "" if nothing is."""
    ask = "import os, signal; os.mkdir('%s/held-' + os.environ['RANK'] + str(signal.SIGINT in signal.pthread_sigmask(0, [])))"
    (folder / "rank.py").write_text(ask % folder)
    try:
        torchrun.run_torchrun([*OPTIONS[:-2], f"{folder}/rank.py"])
    except Exception as error:
        return changed(f"ranks cannot be started ({type(error).__name__})")
    held = {path.name for path in folder.glob("held-*")}
    return "" if held == {"held-0True", "held-1True"} else changed("SubprocessHandler._popen does not start the ranks")


def signal_changes(folder: Path) -> str:
    """What is other than expected when SIGUSR1 is forwarded to two ranks; "" if nothing is."""
    (folder / "ranks").mkdir()
    script = f"trap 'touch {folder}/told-$RANK; exit 0' USR1; touch {folder}/ranks/$$; for _ in $(seq 600); do sleep 0.05; done"
    (folder / "rank.sh").write_text(script)
    leaders = list[bool]()

    def act() -> None:
        deadline = time.monotonic() + 20
        while len(pids := [int(path.name) for path in (folder / "ranks").iterdir()]) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        leaders.extend(os.getpgid(pid) == pid for pid in pids)
        time.sleep(0.5)  # a rank may have begun before torchrun knows that it has started it
        os.kill(os.getpid(), signal.SIGUSR1)

    previous = signal.signal(signal.SIGUSR1, lambda number, frame: torchrun.forward_signal(number))
    thread = threading.Thread(target=act)
    thread.start()
    try:
        ended = torchrun.run_torchrun([*OPTIONS, f"{folder}/rank.sh"])
    except Exception as error:
        return changed(f"a SignalException during run ends as {type(error).__name__}, expected SignalException")
    finally:
        thread.join()
        signal.signal(signal.SIGUSR1, previous)
        torchrun.kill_ranks()
    if ended != signal.SIGUSR1:
        return changed(f"a SignalException during run ends as {ended}, expected its sigval SIGUSR1")
    if not all((folder / f"told-{number}").exists() for number in range(2)):
        return changed("torchrun does not send the signal of a SignalException to every rank")
    return "" if leaders == [True, True] else changed("torchrun does not start each rank in a process group of its own")


def test_torch_has_the_names_that_are_imported():
    assert not (sentence := name_changes()), sentence


def test_torchrun_tells_which_rank_failed():
    assert not (sentence := failure_changes()), sentence


def test_ranks_start_with_interrupts_held_back(tmp_path: Path):
    assert not (sentence := start_changes(tmp_path)), sentence
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, []), "this process still hears of them"


def test_torchrun_forwards_a_signal_to_ranks_that_lead_their_groups(tmp_path: Path):
    assert not (sentence := signal_changes(tmp_path)), sentence


def without_parse_args(patch: pytest.MonkeyPatch) -> None:
    patch.delattr(torch.distributed.run, "parse_args")


def without_timestamps(patch: pytest.MonkeyPatch) -> None:
    plain = errors.ProcessFailure.__post_init__
    patch.setattr(errors.ProcessFailure, "__post_init__", lambda self: plain(self) or setattr(self, "timestamp", 0))


def started_otherwise(patch: pytest.MonkeyPatch) -> None:
    plain = SubprocessHandler.__init__

    def init(self: SubprocessHandler, *args: Any, **options: Any) -> None:
        self._popen = MethodType(popen, self)
        plain(self, *args, **options)

    popen = SubprocessHandler._popen
    patch.setattr(SubprocessHandler, "__init__", init)


def without_forwarding(patch: pytest.MonkeyPatch) -> None:
    plain = api.PContext.close
    patch.setattr(api.PContext, "close", lambda self, death_sig=None, timeout=30: plain(self, signal.SIGKILL, timeout))


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (without_parse_args, "torch.distributed.run has no parse_args"),
        (started_otherwise, "SubprocessHandler._popen does not start the ranks"),
        (without_timestamps, "expected 3 and the time in seconds"),
        (without_forwarding, "torchrun does not send the signal of a SignalException to every rank"),
    ],
)
def test_a_change_in_torch_is_one_sentence(
    fault: Callable[[pytest.MonkeyPatch], None], sentence: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    fault(monkeypatch)
    found = name_changes() or failure_changes() or start_changes(tmp_path) or signal_changes(tmp_path)
    assert sentence in found and "\n" not in found and found.startswith(f"torch {torch.__version__} has changed: ")
