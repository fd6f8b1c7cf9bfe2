"""How a run ends: statuses, one sentence, the first rank that failed; Ctrl-C, kills and last saves that fail in whole runs."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event, Timer
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from launch.checkpoints import find_checkpoint, verify_checkpoint
from launch.exit_status import Status, was_stopped
from launch.run_end import FailureWatch, RunEnd, Stage, clear_failure, end_sentence, first_failure, record_failure
from launch.runtime import World
from launch.stop import record_stop
from tests.launch.faults import Fault, run_main
from tests.launch.test_train import ENVIRONMENT, run
from trainer.monitoring.records import FILE_NAME, read_records
from trainer.session import RunEnded

SECOND = World(rank=1, local_rank=1, world_size=4, local_world_size=2, restarts=0, launched=True)


def session(kept: str, settle: Callable[[float], Any] = lambda seconds: None, at: int = 7, complete: int = 0) -> Any:
    """What RunEnd asks of a session: update `at` of 12 is being made, and step `complete` is saved."""
    checkpoints = SimpleNamespace(describe_newest=lambda: kept, drain=settle, is_complete=lambda step: step == complete)
    settings = SimpleNamespace(train=SimpleNamespace(steps=12))
    return SimpleNamespace(heartbeat=SimpleNamespace(update=at), checkpoints=checkpoints, settings=settings)


def too_much(device: str = "cpu") -> Exception:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 50, dtype=torch.uint8, device=device)
    return raised.value


def test_memory_that_cannot_be_had_is_told_with_its_size_and_a_key():
    told = end_sentence(too_much(), "step 3")
    assert told.startswith("out of memory (1,048,576.00 GiB of host memory asked for at once); use a smaller")
    assert "train.micro_batch_size" in told and "train.recompute=full" in told
    assert "parallel.zero_stage=3" in end_sentence(too_much(), "while starting")


@pytest.mark.gpu
def test_memory_of_a_gpu_that_cannot_be_had_is_told_with_its_size():
    assert "1048576.00 GiB of GPU memory asked for" in end_sentence(too_much("cuda"), "step 3")


def test_other_errors_are_told_by_type_and_message():
    assert end_sentence(KeyError("weight")) == "KeyError: 'weight'"
    assert end_sentence(AssertionError()) == "AssertionError"
    assert end_sentence(RuntimeError("first\nsecond")) == "RuntimeError: first"
    gone = RuntimeError("[/a/pair.cc:553] Connection closed by peer [127.0.0.1]:1. This is typically caused by GLHF!")
    assert end_sentence(gone) == (
        "the connection to another rank was lost (Connection closed by peer [127.0.0.1]:1); that rank or its node was killed, "
        "or left"
    )


def test_only_the_first_failure_is_recorded(tmp_path: Path):
    (tmp_path / "logs").mkdir()
    assert record_failure(tmp_path, "rank 1: step 3: boom") == ""
    assert record_failure(tmp_path, "rank 0: step 3: lost") == first_failure(tmp_path) == "rank 1: step 3: boom"
    clear_failure(tmp_path)
    assert first_failure(tmp_path) == ""


def test_how_far_a_run_is():
    ending = RunEnd(SECOND)
    assert (ending.kept(), ending.saved(), ending.finished()) == ("", False, False)
    for at, complete, wanted in (
        (7, 0, (False, False)),
        (7, 7, (True, False)),
        (12, 12, (True, True)),
        (13, 12, (False, True)),
    ):
        ending.begin(session("kept", at=at, complete=complete))
        assert (ending.saved(), ending.finished()) == wanted


def test_the_first_failure_is_told_once_on_every_computer(tmp_path: Path):
    (tmp_path / "logs").mkdir()
    record_failure(tmp_path, "rank 0: step 3: boom")
    for rank, local, told in ((1, 1, False), (2, 0, True), (3, 1, False)):
        screen = io.StringIO()
        ending = RunEnd(World(rank, local, 4, 2, 0, True), screen, tmp_path)
        ending.reach(Stage.HELD)
        assert ending.failed(RuntimeError("Connection closed by peer")) == Status.FAILED
        sentence = f"tiglon, rank {rank}: ends because another rank failed first: rank 0: step 3: boom\n"
        assert screen.getvalue() == (sentence if told else "")


def test_a_failure_names_its_step_the_checkpoint_and_the_log(tmp_path: Path, capsys: pytest.CaptureFixture):
    screen = io.StringIO()
    ending = RunEnd(SECOND, screen, keep_log=lambda: tmp_path / "log")
    ending.reach(Stage.LOCKED)
    ending.begin(session("the newest is N"))
    assert ending.failed(RuntimeError("boom")) == 1
    told = f"tiglon, rank 1: step 7: RuntimeError: boom; the newest is N; traceback in {tmp_path}/log\n"
    assert screen.getvalue() == told and "RuntimeError: boom" in capsys.readouterr().err, "stderr is the log"
    assert ending.failed(RunEnded("step 7: the loss is nan")) == 1
    assert screen.getvalue() == f"{told}tiglon, rank 1: step 7: the loss is nan; the newest is N; log: {tmp_path}/log\n"


def test_a_rank_that_ends_by_itself_is_not_ended_before_it_has_said_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It waits for its save in flight, and so does the thread that looks for failures, which finds this rank's own."""
    (tmp_path / "logs").mkdir()
    screen, settled, left = io.StringIO(), Event(), list[str]()
    ending = RunEnd(SECOND, screen, tmp_path, lambda: tmp_path / "log")
    ending.reach(Stage.HELD)
    monkeypatch.setattr(FailureWatch, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(FailureWatch, "PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(os, "_exit", lambda status: left.append(screen.getvalue()))
    ending.begin(session("", lambda seconds: settled.wait(seconds)))
    with FailureWatch(ending, SECOND, lambda seconds: settled.wait(seconds) and None) as watch:
        Timer(0.5, settled.set).start()
        ending.failed(RuntimeError("boom"))
        watch._thread.join(10)  # which it ends: the end itself takes too long
    assert left == [f"tiglon, rank 1: step 7: RuntimeError: boom; traceback in {tmp_path}/log\n"]


def test_a_failure_is_seen_though_its_disk_was_full(tmp_path: Path):
    (tmp_path / "logs").mkdir()
    assert first_failure(tmp_path) == ""
    (tmp_path / "logs/failed").touch()
    assert first_failure(tmp_path) == "another rank failed first"


def test_before_there_is_a_log_no_traceback_is_on_the_screen(capsys: pytest.CaptureFixture):
    assert RunEnd(SECOND).failed(RuntimeError("boom")) == 1
    told = capsys.readouterr().err
    assert told.startswith("tiglon, rank 1: while starting: RuntimeError: boom; the traceback is in ") and told.count("\n") == 1
    kept = Path(told.split()[-1])
    assert "RuntimeError: boom" in kept.read_text()
    kept.unlink()


class Command:
    """`tiglon train` as a user starts it."""

    def __init__(self, configuration: str, *options: str, cwd: Path | None = None):
        command = [sys.executable, "-m", "launch", "train", configuration, *options]
        self.process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, cwd=cwd)
        self.screen = ""

    def read_until(self, word: str) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.screen += line
            if word in line:
                return
        raise AssertionError(f"it ended without '{word}':\n{self.screen}")

    def ranks(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()

    def end(self) -> int:
        self.screen += self.process.communicate(timeout=120)[1]
        return self.process.returncode


LONG = ("train.steps=100000", "checkpoint.every_steps=20")


def assert_gone(ranks: list[psutil.Process]) -> None:
    end = time.monotonic() + 10
    while any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks):
        assert time.monotonic() < end, "a rank is left behind"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c_saves_and_says_so_and_the_same_command_resumes(configuration: str, tmp_path: Path, ranks: int):
    command = Command(configuration, *LONG, "--nproc", str(ranks))
    command.read_until("checkpoint of step 20 complete")
    left = command.ranks()
    command.process.send_signal(signal.SIGINT)
    assert command.end() == Status.STOPPED, command.screen
    newest = find_checkpoint(tmp_path / "run")
    verify_checkpoint(newest)
    assert "SIGINT: the run saves and leaves; a second SIGINT leaves at once" in command.screen
    assert f"saved in {newest}; the same command resumes\n" in command.screen and "Traceback" not in command.screen
    assert was_stopped(tmp_path / "run")
    assert_gone(left)
    said = run(configuration, "train.steps=3", "checkpoint.every_steps=20")
    assert f"resumed from {newest}" in said and not was_stopped(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c_before_training_is_one_sentence_at_any_moment(configuration: str, ranks: int):
    """Imports swallow interrupts, or fail of something else; ranks and their launcher hear of the same one."""
    for seconds in (0.6, 1.2, 1.8, 2.4, 3.0, 3.6, 4.2):
        command = Command(configuration, *LONG, "--nproc", str(ranks))
        time.sleep(seconds)
        command.process.send_signal(signal.SIGINT)
        status = command.end()
        told = [line for line in command.screen.splitlines() if "interrupted" in line or "ended by SIGINT" in line]
        assert "Traceback" not in command.screen
        if status != Status.STOPPED:
            assert status == Status.INTERRUPTED and len(told) == 1, command.screen


@pytest.mark.slow
def test_ctrl_c_while_the_ranks_start_their_python_is_one_sentence(configuration: str):
    for seconds in (0.0, 0.01, 0.02, 0.03, 0.05, 0.1):
        command = Command(configuration, *LONG, "--nproc", "2")
        while len(command.ranks()) < 2:
            time.sleep(0.001)
        time.sleep(seconds)
        command.process.send_signal(signal.SIGINT)
        status = command.end()
        assert command.screen == "tiglon: ended by SIGINT before the run was saved; training had not begun\n", seconds
        assert status == Status.INTERRUPTED


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_second_ctrl_c_leaves_at_once_and_no_rank_behind(configuration: str, ranks: int):
    slow = ("parallel.engine=fold", "optimizer.name=tiger", "train.global_batch_size=20000", "train.micro_batch_size=100")
    command = Command(configuration, *LONG, *slow, "--nproc", str(ranks))
    command.read_until("goal")
    time.sleep(3)  # into the first step, which fold does not leave
    left = command.ranks()
    command.process.send_signal(signal.SIGINT)
    command.read_until("a second SIGINT leaves at once")
    time.sleep(0.2)
    command.process.send_signal(signal.SIGINT)
    began = time.monotonic()
    assert command.end() == Status.INTERRUPTED, command.screen
    assert time.monotonic() - began < 5 and "left at once by a second SIGINT" in command.screen
    assert_gone(left)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_closed_pipe_does_not_end_a_run(configuration: str, tmp_path: Path, ranks: int):
    command = Command(configuration, "train.steps=30", "--nproc", str(ranks))
    command.read_until("goal")
    assert command.process.stderr is not None
    command.process.stderr.close()
    assert command.process.wait(timeout=120) == Status.DONE
    assert find_checkpoint(tmp_path / "run").endswith("step-00000030")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_without_standard_streams_trains(configuration: str, tmp_path: Path, ranks: int):
    shell = f"exec {sys.executable} -m launch train {configuration} --nproc {ranks} >&- 2>&- <&-"
    assert subprocess.run(["sh", "-c", shell], env=ENVIRONMENT, check=False, timeout=120).returncode == Status.DONE
    verify_checkpoint(find_checkpoint(tmp_path / "run"))
    assert len(read_records(tmp_path / "run" / FILE_NAME)) == 12


@pytest.mark.slow
def test_ctrl_z_for_longer_than_the_watchdog_waits_is_no_hang(configuration: str):
    command = Command(configuration, *LONG, "health.hang_seconds=4")
    command.read_until("checkpoint of step 20 complete")
    command.process.send_signal(signal.SIGTSTP)
    time.sleep(8)
    command.process.send_signal(signal.SIGCONT)
    command.read_until("checkpoint of step")
    time.sleep(1)
    command.process.send_signal(signal.SIGTERM)
    assert command.end() == Status.STOPPED, command.screen


@pytest.mark.slow
def test_ranks_that_are_started_again_say_why(configuration: str):
    command = Command(configuration, "train.steps=600", "checkpoint.every_steps=20", "--nproc", "2", "--max-restarts", "1")
    command.read_until("checkpoint of step 20 complete")
    command.ranks()[1].send_signal(signal.SIGKILL)
    assert command.end() == Status.DONE, command.screen
    assert "\nthe ranks were started again (restart 1): " in command.screen and "\nresumed from " in command.screen


@pytest.mark.slow
def test_a_killed_rank_is_named_and_the_others_end(configuration: str):
    command = Command(configuration, *LONG, "--nproc", "2")
    command.read_until("checkpoint of step 20 complete")
    ranks = command.ranks()
    ranks[1].send_signal(signal.SIGKILL)
    assert command.end() == 128 + signal.SIGKILL
    assert "tiglon: rank 1 was killed (SIGKILL); out of memory?" in command.screen
    assert "the newest complete checkpoint is" in command.screen and "rank-1.log" in command.screen
    assert_gone(ranks)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_an_earlier_run_left_is_no_success_of_this_one(configuration: str, tmp_path: Path, number: signal.Signals):
    """A finished run and the record of a stop lie in the directory when the ranks are ended before they have begun."""
    run(configuration)
    record_stop(tmp_path / "run", "stopped by SIGTERM")
    command = Command(configuration, "checkpoint.resume=never", "--nproc", "2")
    end = time.monotonic() + 60
    while not command.ranks():
        assert time.monotonic() < end
        time.sleep(0.01)
    command.process.send_signal(number)
    assert command.end() == 128 + number
    assert f"tiglon: ended by {number.name} before the run was saved; training had not begun\n" in command.screen


@pytest.mark.slow
def test_a_command_killed_while_its_ranks_begin_takes_them_with_it(configuration: str):
    command = Command(configuration, *LONG, "--nproc", "2")
    end = time.monotonic() + 60
    while not (ranks := command.ranks()):
        assert time.monotonic() < end
        time.sleep(0.01)
    command.process.kill()
    command.end()
    time.sleep(5)  # they import torch before they can ask the kernel, and find their parent gone
    assert_gone(ranks)


@pytest.mark.slow
def test_a_killed_command_takes_its_ranks_with_it_and_gives_the_directory_back(configuration: str):
    command = Command(configuration, *LONG, "--nproc", "2")
    command.read_until("checkpoint of step 20 complete")
    ranks = command.ranks()
    command.process.kill()
    assert command.end() == -signal.SIGKILL
    assert_gone(ranks)
    assert "resumed from" in run(configuration, "train.steps=20", "checkpoint.every_steps=20")


@pytest.mark.parametrize("asynchronous", ["true", pytest.param("false", marks=pytest.mark.slow)])
def test_a_last_save_that_fails_is_retried_and_then_no_success(
    configuration: str, tmp_path: Path, asynchronous: str, monkeypatch: pytest.MonkeyPatch
):
    options = ["train.steps=8", f"checkpoint.asynchronous={asynchronous}"]
    statuses, screen = run_main(1, tmp_path / "screens", [configuration, *options], Fault("full-disk", 5))
    assert statuses == [1]
    kept = f"{tmp_path}/run/checkpoints/step-00000004"
    assert f"step 8 is not saved: rank 0: No space left on device; the newest complete checkpoint is {kept}; log: " in screen
    assert screen.count("trying again") == 2 and "saved in" not in screen and "Traceback" not in screen
    assert run_main(1, tmp_path / "screens", [configuration, *options])[0] == [0]


def test_a_stop_that_cannot_be_saved_is_no_orderly_stop(configuration: str, tmp_path: Path):
    faults = Fault("full-disk", 5), Fault("SIGTERM", 6)
    statuses, screen = run_main(1, tmp_path / "screens", [configuration], *faults)
    assert statuses == [1] and "is not saved: rank 0: No space left on device; the newest complete checkpoint" in screen
    assert "stopped by" not in screen and not was_stopped(tmp_path / "run")


@pytest.mark.slow
def test_observations_lost_to_a_kill_after_the_save_are_made_on_resume(configuration: str, corpus: Path, tmp_path: Path):
    options = [f"data.validation={corpus}/shards/validation", "evaluate.every_steps=4", "evaluate.contexts=[16]",
               "log.sample_prompt=def", "log.sample_tokens=4", "log.attention_every_steps=4",
               "log.tensorboard=true"]  # fmt: skip
    run(configuration, *options, f"run.dir={tmp_path}/whole")
    run(configuration, *options)
    path = tmp_path / "run" / FILE_NAME
    before = [(json.loads(line), line) for line in path.read_text().splitlines(True)]
    kept = [line for r, line in before if r["step"] < 8 or (r["step"] == 8 and r["kind"] in ("train", "attention"))]
    path.write_text("".join(kept))
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000012")
    run(configuration, *options)
    whole, again = (_observations(tmp_path / name) for name in ("whole", "run"))
    assert again == whole and len(whole) == 3 * (2 + 1 + 1 + 1)


def _observations(directory: Path) -> list[tuple]:
    records = [r for r in read_records(directory / FILE_NAME) if r["kind"] in ("evaluate", "attention", "text")]
    return sorted(
        (r["step"], r["kind"], str(r.get("name")), r.get("context", 0), r.get("loss", r.get("text"))) for r in records
    )
