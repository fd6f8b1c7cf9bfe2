"""How a run ends: statuses, one sentence, the first rank that failed."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Event, Timer

import psutil
import pytest
import torch

import launch.runtime
from launch.ending import Ending, FailureWatch, claim, first_failure, forget_failure, forget_stop, record_stop, sentence
from launch.program import memory_asked
from launch.ranks import _first
from launch.runtime import Chatter, World, import_path, world
from launch.status import Status, was_stopped
from tests.launch.faults import Fault, run_main
from tests.launch.test_train import ENVIRONMENT, run
from tests.ranks import run_ranks
from trainer.loop import RunEnded
from trainer.metrics import FILE_NAME, read_records
from trainer.restore import find, verify

SECOND = World(rank=1, local_rank=1, world_size=4, local_world_size=2, restarts=0, launched=True)


def too_much(device: str = "cpu") -> Exception:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 50, dtype=torch.uint8, device=device)
    return raised.value


def test_memory_that_cannot_be_had_is_told_with_its_size_and_a_key():
    told = sentence(too_much(), "step 3")
    assert told.startswith("out of memory (1,048,576.00 GiB of host memory asked for at once); use a smaller")
    assert "train.micro_batch_size" in told and "train.recompute=full" in told
    assert "parallel.zero_stage=3" in sentence(too_much(), "while starting")


@pytest.mark.gpu
def test_memory_of_a_gpu_that_cannot_be_had_is_told_with_its_size():
    assert "1048576.00 GiB of GPU memory asked for" in sentence(too_much("cuda"), "step 3")


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.10 GiB"),
         " (20.00 MiB of GPU memory asked for at once)"),
        (MemoryError("Unable to allocate 3.5 GiB for an array with shape (7,)"), " (3.5 GiB of host memory asked for at once)"),
        (MemoryError(), ""),
        (OSError(12, "Cannot allocate memory"), ""),
        (RuntimeError("shape mismatch"), None),
    ],
)  # fmt: skip
def test_what_was_asked_for(error: Exception, wanted: str | None):
    assert memory_asked(error) == wanted


def test_other_errors_are_told_by_type_and_message():
    assert sentence(KeyError("weight")) == "KeyError: 'weight'"
    assert sentence(AssertionError()) == "AssertionError"
    assert sentence(RuntimeError("first\nsecond")) == "RuntimeError: first"
    gone = RuntimeError("[/a/pair.cc:553] Connection closed by peer [127.0.0.1]:1. This is typically caused by GLHF!")
    assert sentence(gone) == (
        "the connection to another rank was lost (Connection closed by peer [127.0.0.1]:1); that rank or its node was killed, "
        "or left"
    )


def test_only_the_first_failure_is_claimed(tmp_path: Path):
    (tmp_path / "logs").mkdir()
    assert claim(tmp_path, "rank 1: step 3: boom") == "" and claim(tmp_path, "rank 0: step 3: lost") == "rank 1: step 3: boom"
    record_stop(tmp_path, "stopped by SIGTERM")
    assert was_stopped(tmp_path) and first_failure(tmp_path) == "rank 1: step 3: boom"
    forget_stop(tmp_path)
    forget_failure(tmp_path)
    assert not was_stopped(tmp_path) and first_failure(tmp_path) == ""


def test_the_first_failure_is_told_once_on_every_computer(tmp_path: Path):
    (tmp_path / "logs").mkdir()
    claim(tmp_path, "rank 0: step 3: boom")
    for rank, local, told in ((1, 1, False), (2, 0, True), (3, 1, False)):
        ending = Ending(World(rank, local, 4, 2, 0, True))
        ending.directory, ending.screen = tmp_path, io.StringIO()
        assert ending.failed(RuntimeError("Connection closed by peer")) == Status.FAILED
        sentence = f"tiglon, rank {rank}: ends because another rank failed first: rank 0: step 3: boom\n"
        assert ending.screen.getvalue() == (sentence if told else "")


def test_a_failure_names_its_step_the_checkpoint_and_the_log(tmp_path: Path, capsys: pytest.CaptureFixture):
    ending = Ending(SECOND)
    ending.screen = io.StringIO()
    ending.keep_log = lambda: tmp_path / "log"
    ending.begin(lambda: "step 7", lambda: "the newest is N", lambda seconds: None, lambda: False, lambda: False)
    assert ending.failed(RuntimeError("boom")) == 1
    told = f"tiglon, rank 1: step 7: RuntimeError: boom; the newest is N; traceback in {tmp_path}/log\n"
    assert ending.screen.getvalue() == told and "RuntimeError: boom" in capsys.readouterr().err, "stderr is the log"
    assert ending.failed(RunEnded("step 7: the loss is nan")) == 1
    assert ending.screen.getvalue() == f"{told}tiglon, rank 1: step 7: the loss is nan; the newest is N; log: {tmp_path}/log\n"


def test_a_rank_that_ends_by_itself_is_not_ended_before_it_has_said_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It waits for its save in flight, and so does the thread that looks for failures, which finds this rank's own."""
    (tmp_path / "logs").mkdir()
    ending, settled, left = Ending(SECOND), Event(), list[str]()
    ending.directory, ending.screen, ending.keep_log = tmp_path, io.StringIO(), lambda: tmp_path / "log"
    monkeypatch.setattr(FailureWatch, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(FailureWatch, "PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(os, "_exit", lambda status: left.append(ending.screen.getvalue()))  # type: ignore[attr-defined]
    ending.begin(lambda: "step 7", lambda: "", lambda seconds: settled.wait(seconds) and None, lambda: False, lambda: False)
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
    class Failure:
        timestamp = 7

        def __init__(self, exitcode: int):
            self.exitcode = exitcode

    assert _first({rank: Failure(code) for rank, code in codes.items()})[0] == guilty  # type: ignore[dict-item]


def test_before_there_is_a_log_no_traceback_is_on_the_screen(capsys: pytest.CaptureFixture):
    assert Ending(SECOND).failed(RuntimeError("boom")) == 1
    told = capsys.readouterr().err
    assert told.startswith("tiglon, rank 1: while starting: RuntimeError: boom; the traceback is in ") and told.count("\n") == 1
    kept = Path(told.split()[-1])
    assert "RuntimeError: boom" in kept.read_text()
    kept.unlink()


CONTRADICTIONS = [
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE = 2 is set but RANK is not"),
    ({"WORLD_SIZE": "abc"}, "the environment has WORLD_SIZE = 'abc', not a number of ranks"),
    ({"WORLD_SIZE": "0"}, "WORLD_SIZE = '0', not a number of ranks"),
    ({"RANK": "-1"}, "RANK = '-1', not a number"),
    ({"RANK": "1"}, "RANK = 1 is set and WORLD_SIZE and MASTER_ADDR and MASTER_PORT are not"),
    ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "RANK = 0 is set and MASTER_PORT is not"),
    ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK = 2 and WORLD_SIZE = 2 contradict"),
    ({"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK = 3 and LOCAL_WORLD_SIZE = 2 contradict"),
    ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
     "LOCAL_WORLD_SIZE = 8 and WORLD_SIZE = 2 contradict"),
]  # fmt: skip


@pytest.mark.parametrize(("variables", "wanted"), CONTRADICTIONS)
def test_launcher_variables_that_contradict_each_other_are_named(
    variables, wanted, monkeypatch, configuration, capsys, tmp_path
):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"RANK|WORLD_SIZE"):
        world()
    assert launch.train.main([configuration]) == Status.MISTAKE
    said = capsys.readouterr().err
    assert wanted in said and said.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_lone_rank_needs_no_address(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert world().launched


def test_a_screen_that_is_gone_ends_nothing():
    read, write = os.pipe()
    os.close(read)
    screen = launch.runtime.Screen(write, "ascii")
    print("Grüße", file=screen, flush=True)
    assert screen.fileno() == write and not screen.isatty()
    os.close(write)


def _chatter(rank: int, world_size: int, folder: str) -> str:
    os.dup2(os.open(f"{folder}/screen", os.O_WRONLY | os.O_CREAT), 2)
    chatter = Chatter()
    os.system("echo from C 1>&2")
    print("early", flush=True)
    before = sorted(path.name for path in Path(folder).iterdir())
    chatter.keep(Path(folder) / "logs/rank-0.log")
    print("late", flush=True)
    print("seen", file=chatter.screen, flush=True)
    return " ".join(before)


def test_what_is_printed_before_the_run_is_sure_to_start_comes_into_the_log_then(tmp_path: Path):
    assert run_ranks(_chatter, 1, str(tmp_path)) == ["screen"]
    assert (tmp_path / "screen").read_text() == "seen\n"
    assert (tmp_path / "logs/rank-0.log").read_text().splitlines() == ["from C", "early", "late"]


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
    newest = find(tmp_path / "run")
    verify(newest)
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
    assert find(tmp_path / "run").endswith("step-00000030")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_without_standard_streams_trains(configuration: str, tmp_path: Path, ranks: int):
    shell = f"exec {sys.executable} -m launch train {configuration} --nproc {ranks} >&- 2>&- <&-"
    assert subprocess.run(["sh", "-c", shell], env=ENVIRONMENT, check=False, timeout=120).returncode == Status.DONE
    verify(find(tmp_path / "run"))
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["data.py", "model.py", "trainer.py", "data", "model/layers.py"])
def test_a_stray_file_in_the_working_directory_breaks_no_run(configuration: str, tmp_path: Path, name: str):
    stray = tmp_path / "here" / name
    stray.parent.mkdir(parents=True)
    stray.write_text("raise SystemExit('somebody else')\n") if stray.suffix else stray.mkdir()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", "-m", "launch.train"]
    environment = {name: value for name, value in ENVIRONMENT.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    for start in (torchrun, [sys.executable, "-m", "launch", "train"]):
        command = [*start, configuration, "train.steps=1", f"run.dir={tmp_path}/{len(start)}"]
        done = subprocess.run(command, env=environment, cwd=tmp_path / "here", capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr


def test_a_file_of_that_name_that_was_imported_before_is_named(tmp_path: Path):
    (tmp_path / "data.py").touch()
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import data, launch"
    done = subprocess.run([sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert f"ImportError: tiglon needs its package 'data', but {tmp_path}/data.py was imported before; rename it" in done.stderr


def test_ranks_do_not_look_into_the_working_directory():
    assert import_path()["PYTHONSAFEPATH"] == "1"


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
def test_a_run_killed_between_a_save_and_its_look_looks_when_it_resumes(configuration: str, corpus: Path, tmp_path: Path):
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
    whole, again = (_looks(tmp_path / name) for name in ("whole", "run"))
    assert again == whole and len(whole) == 3 * (2 + 1 + 1 + 1)


def _looks(directory: Path) -> list[tuple]:
    records = [r for r in read_records(directory / FILE_NAME) if r["kind"] in ("evaluate", "attention", "text")]
    return sorted(
        (r["step"], r["kind"], str(r.get("name")), r.get("context", 0), r.get("loss", r.get("text"))) for r in records
    )
