"""An exception at each verb of the training loop, on one rank: one sentence, no rank is left waiting, no due save is lost.

The ranks are forked and meet as under torchrun, but nothing ends the others when one has failed: they have to notice.

    python -m pytest -m slow tests/launch/test_verbs.py [-k "batches and 1of2"]
"""

import multiprocessing
import os
import re
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import launch.observers
import launch.runtime
import launch.session
import launch.train
from data.storage import open_store
from launch.checkpoints import verify_checkpoint
from launch.train import main
from trainer.checkpoint.api import Checkpoints
from trainer.checkpoint.directory import directory_name, saved_steps
from trainer.checkpoint.writer import CheckpointWriter
from trainer.session import Session
from trainer.state import State

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SAVE_EVERY = 4
STEPS = 12
NOTICE_SECONDS = 60
"""In which every rank must have ended after one has failed: far below parallel.timeout_seconds."""
LIMIT_SECONDS = 100
"""Of a whole run; ranks that are still there are killed."""
OPTIONS = [
    "checkpoint.keep=9",
    "evaluate.every_steps=4",
    "log.attention_every_steps=4",
    "log.sample_prompt=def ",
    "log.sample_tokens=4",
    "health.replica_check_every_steps=1",
]
PLACES = [(0, 1), (0, 2), (1, 2)]
"""The rank that fails, of how many."""
BEFORE = (
    "stop.requested",
    "profile.before",
    "learning_rate",
    "batches",
    "engine.accumulate",
    "wait_for_checkpoint_copy",
    "engine.update",
)
"""Verbs that come before the update of a step; an error at step n is met with n updates done."""
AFTER = ("check_health", "log", "compare_replicas")
"""Verbs between the update and the save."""
LOOKS = ("log", "diagnose", "evaluate", "look", "evaluation", "sample")
"""What may fail with a message, after which training continues."""

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["torch", "torch.distributed", "tests.preload"])


@dataclass(frozen=True)
class Ended:
    """What came of a run."""

    statuses: list[int | None]
    """By rank; None = it was still there after LIMIT_SECONDS."""
    screens: list[str]
    seconds: float
    """From the error to the end of the last rank."""

    def __str__(self) -> str:
        """For the message of a test that fails."""
        parts = [f"statuses {self.statuses}, {self.seconds:.1f} s after the error"]
        for rank, screen in enumerate(self.screens):
            parts += [f"screen of rank {rank}, its end:", *(f"    {line}" for line in screen.splitlines()[-12:])]
        return "\n".join(parts)


def run(folder: Path, ranks: int, arguments: list[str], failing: int, verb: str, step: int) -> Ended:
    """The ranks of a run, one of which meets `RuntimeError("injected")` once, at a verb and step ("" = none does)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mark = folder / "injected"
    mark.unlink(missing_ok=True)
    processes = []
    for rank in range(ranks):
        (folder / f"screen-{rank}").write_text("")
        what = (verb, step) if rank == failing else ("", 0)
        process = _server.Process(target=_rank, args=(rank, ranks, port, str(folder), arguments, *what), daemon=True)
        process.start()
        processes.append(process)
    deadline = time.monotonic() + LIMIT_SECONDS
    for process in processes:
        process.join(max(0.1, deadline - time.monotonic()))
    ended = time.monotonic()
    statuses = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    began = float(mark.read_text()) if mark.exists() else float("nan")
    return Ended(statuses, [(folder / f"screen-{rank}").read_text() for rank in range(ranks)], ended - began)


def _rank(rank: int, ranks: int, port: int, folder: str, arguments: list[str], verb: str, step: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT=str(port), LOCAL_WORLD_SIZE=str(ranks))
    launch.runtime.cores = lambda: 1  # one thread a rank: threads that spin starve others
    os.dup2(os.open(f"{folder}/screen-{rank}", os.O_WRONLY | os.O_APPEND), 2)
    if verb:
        inject(verb, step, Path(folder) / "injected")
    raise SystemExit(main(arguments))


class Injected:
    """The error, once."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __call__(self, due: bool = True) -> None:
        """Raise it, if it is due and has not been raised."""
        if due and not self._mark.exists():
            self._mark.write_text(repr(time.monotonic()))
            raise RuntimeError("injected")


def inject(verb: str, step: int, mark: Path) -> None:
    """Arrange for the error in this process."""
    fail = Injected(mark)
    match verb:
        case "build":
            _before(launch.session, "build_engine", lambda *_: fail())
        case "restore":
            _before(launch.session, "restore", lambda *_: fail())
        case "newest":
            _before(Checkpoints, "newest", lambda *_: fail())
        case "writer":
            _before(CheckpointWriter, "write", lambda writer, tensors, meta: fail(meta.step == step))
        case _:
            _before(launch.train, "train", lambda run, state: _spoil(run, state, verb, step, fail))


def _before(owner: Any, name: str, act: Callable) -> None:
    """Have `act` called with the same positional arguments before a function."""
    plain = getattr(owner, name)

    def both(*arguments: Any, **options: Any) -> Any:
        act(*arguments)
        return plain(*arguments, **options)

    setattr(owner, name, both)


def _spoil(run: Session, state: State, verb: str, step: int, fail: Injected) -> None:
    """Put the error before a verb of this run."""
    now = [state.step]  # updates done, as far as the verbs were told
    _before(run, "check_health", lambda state, *_: now.__setitem__(0, state.step))
    match verb:
        case "look" | "evaluation" | "sample":
            name = {"look": "attention_statistics", "evaluation": "evaluate", "sample": "sample"}[verb]
            _before(launch.observers, name, lambda *_: fail(now[0] == step))
        case "check_health":
            _before(run, "check_health", lambda state, *_: fail(state.step == step))
        case "engine.accumulate" | "engine.update":
            _before(run.engine, verb.partition(".")[2], lambda *_: fail(now[0] == step))
        case "profile.before" | "stop.requested":
            part, _, name = verb.partition(".")
            _before(getattr(run, part), name, lambda *_: fail(now[0] == step))
        case _:
            _before(run, verb, lambda *_: fail(now[0] == step))


def complaints(ended: Ended, directory: Path, failing: int, verb: str, step: int | None) -> list[str]:
    """What is wrong with how the ranks ended: the failing one is to say in one sentence who, where, what, and where the
    traceback is, and to leave with status 1; the others are to leave too."""
    found = []
    who = r"tiglon(, rank 0)?" if failing == 0 else f"tiglon, rank {failing}"
    where = "while starting: " if step is None else rf"step ({step}|{step + 1}): "
    if verb == "writer":  # what was written is a later step's news
        where = ""
    log = directory / "logs" / f"rank-{failing}.log"
    what = r".*\binjected\b" if verb in (*LOOKS, "writer") else rf"RuntimeError: injected\b.*traceback in {re.escape(str(log))}"
    if re.search(sentence := f"^{who}: {where}{what}", ended.screens[failing], re.MULTILINE) is None:
        found.append(f"no line on the screen of rank {failing} is like {sentence}")
    if ended.statuses[failing] != 1:
        found.append(f"the failing rank {failing} ended with {ended.statuses[failing]}, wanted 1")
    for rank, status in enumerate(ended.statuses):
        if rank != failing and not status:
            found.append(f"rank {rank} ended with 0" if status == 0 else f"rank {rank} was still there")
    if not ended.seconds < NOTICE_SECONDS:
        found.append(f"the last rank ended {ended.seconds:.0f} s after the error, wanted within {NOTICE_SECONDS}")
    if not ("Traceback" in (text := log.read_text()) and "injected" in text):
        found.append(f"there is no traceback in {log}")
    return found


def unsaved(directory: Path, newest: int) -> list[str]:
    """What is wrong with the checkpoints: each is to be whole, and the newest no older than the last save that was due."""
    found = saved_steps(open_store(str(directory / "checkpoints")))
    wrong = []
    for step in found:
        try:
            verify_checkpoint(directory / "checkpoints" / directory_name(step))
        except (ValueError, OSError) as error:
            wrong.append(f"checkpoint of step {step}: {error}")
    late = max(found, default=0) < newest
    return [*wrong, *([f"the save due at step {newest} is not there, only {found}"] if late else [])]


def judge(ended: Ended, wrong: list[str]) -> None:
    """Fail with everything that is wrong and the end of the screens."""
    wrong += [f"a traceback is on the screen of rank {n}" for n, screen in enumerate(ended.screens) if "Traceback" in screen]
    if wrong:
        pytest.fail("\n".join([*wrong, str(ended)]), pytrace=False)


def _cases() -> list[Any]:
    cases = [(verb, step) for verb in (*BEFORE, *AFTER) for step in (7, 8)]
    for verb in ("batches", "stop.requested"):  # at 8 the attention diagnostic reads a batch first, and an evaluation asks
        cases[cases.index((verb, 8))] = (verb, 9)
    cases += [(verb, 8) for verb in ("save", "diagnose", "evaluate", "run_evaluations", "evaluation", "sample", "writer")]
    return [
        pytest.param(verb, step, failing, ranks, id=f"{verb}-{step}-rank{failing}of{ranks}")
        for verb, step in cases
        for failing, ranks in PLACES
    ]


@pytest.mark.parametrize(("verb", "step", "failing", "ranks"), _cases())
def test_an_error_at_a_verb_is_one_sentence_and_costs_no_save(
    configuration: str, corpus: Path, tmp_path: Path, verb: str, step: int, failing: int, ranks: int
):
    directory = tmp_path / "run"
    arguments = [configuration, *OPTIONS, f"data.validation={corpus}/shards/validation"]
    ended = run(tmp_path, ranks, arguments, failing, verb, step)
    if not (tmp_path / "injected").exists():
        judge(ended, ["the verb never came"])
    if verb in (*LOOKS, "writer") and ended.statuses == [0] * ranks:  # a message, and training continued
        silent = [] if "injected" in "".join(ended.screens) else ["nothing was said of the error"]
        judge(ended, [*silent, *unsaved(directory, STEPS)])
        return
    saved_before = verb in BEFORE or verb in ("diagnose", "evaluate", "run_evaluations", "evaluation", "sample")
    due = 8 if step >= 8 and saved_before else 4
    judge(ended, [*complaints(ended, directory, failing, verb, step), *unsaved(directory, due)])


@pytest.mark.parametrize(("failing", "ranks"), PLACES)
@pytest.mark.parametrize("verb", ["build", "newest", "restore"])
def test_an_error_while_a_run_is_put_together_is_one_sentence(
    configuration: str, tmp_path: Path, verb: str, failing: int, ranks: int
):
    begun = run(tmp_path, ranks, [configuration, "train.steps=4"], 0, "", 0)
    assert begun.statuses == [0] * ranks, str(begun)
    ended = run(tmp_path, ranks, [configuration], failing, verb, 0)
    judge(ended, [*complaints(ended, tmp_path / "run", failing, verb, None), *unsaved(tmp_path / "run", 4)])
    again = run(tmp_path, ranks, [configuration], 0, "", 0)
    assert again.statuses == [0] * ranks, f"the same command does not resume\n{again}"
