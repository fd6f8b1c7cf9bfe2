"""Signals and faults: each is noticed, named in one sentence, and loses nothing."""

import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.checkpoints import read_tensor, tensor_names, verify_checkpoint
from tests.launch.faults import Fault, run_main, seconds_to_leave
from trainer.monitoring.records import FILE_NAME, read_records

STEPS = 12
GRACE_SECONDS = 30.0
"""The default of health.grace_seconds."""


def _losses(directory: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in read_records(directory / FILE_NAME) if record["kind"] == "train"}


def _health(directory: Path) -> list[tuple[int, str, str]]:
    records = read_records(directory / FILE_NAME)
    return [(record["step"], record["what"], record["action"]) for record in records if record["kind"] == "health"]


def _same_state(one: Path, other: Path) -> bool:
    return tensor_names(one).keys() == tensor_names(other).keys() and all(
        read_tensor(one, name).equal(read_tensor(other, name)) for name in tensor_names(one)
    )


def _assert_as_unbroken(tmp_path: Path, health: list[tuple[int, str, str]]) -> None:
    """The run in run/ has the losses, health records and state of the one in whole/."""
    assert _losses(tmp_path / "run") == _losses(tmp_path / "whole")
    assert _health(tmp_path / "run") == _health(tmp_path / "whole") == health
    assert _same_state(_last(tmp_path / "run"), _last(tmp_path / "whole"))


def _last(directory: Path) -> Path:
    return sorted((directory / "checkpoints").glob("step-*"))[-1]


def _signalled(configuration: str, tmp_path: Path, ranks: int, moments: int, seed: int) -> list[float]:
    """Seconds from each signal to the end of the run."""
    draw, seconds = random.Random(seed), []
    options = ["checkpoint.every_steps=0"]
    assert run_main(ranks, tmp_path / "screens", [configuration, f"run.dir={tmp_path}/whole", *options])[0] == [0] * ranks
    for moment in range(moments):
        directory = tmp_path / f"cut-{moment}"
        arguments = [configuration, f"run.dir={directory}", *options]
        name = draw.choice(["SIGTERM", "SIGUSR1"])
        fault = Fault(name, draw.randrange(STEPS // 2), draw.randrange(ranks), draw.uniform(0, 0.03))
        slow = Fault("slow", fault.step, rank=None, delay_seconds=0.02)  # it ends 0.2 s later, at the earliest
        statuses, screen = run_main(ranks, tmp_path / "screens", arguments, fault, slow)
        assert statuses == [85] * ranks, screen
        assert f"saved in {_last(directory)}; the same command resumes" in screen
        verify_checkpoint(_last(directory))
        assert fault.step <= int(_last(directory).name[-8:]) < STEPS
        seconds.append(seconds_to_leave(tmp_path / "screens"))
        statuses, screen = run_main(ranks, tmp_path / "screens", arguments)
        assert statuses == [0] * ranks and "resumed from" in screen
        assert _losses(directory) == _losses(tmp_path / "whole")
        assert _same_state(_last(directory), _last(tmp_path / "whole"))
    return seconds


@pytest.mark.parametrize(("ranks", "moments"), [(1, 3), (2, 2)])
def test_a_stop_signal_at_any_moment_loses_nothing(configuration: str, tmp_path: Path, ranks: int, moments: int):
    assert max(_signalled(configuration, tmp_path, ranks, moments, seed=ranks)) < GRACE_SECONDS


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_stop_signal_at_twenty_moments_loses_nothing(configuration: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    seconds = _signalled(configuration, tmp_path, ranks=2, moments=20, seed=7)
    with capsys.disabled():
        print(
            f"\nfrom signal to end: median {statistics.median(seconds):.2f} s, longest {max(seconds):.2f} s of {len(seconds)}"
        )
    assert max(seconds) < GRACE_SECONDS


LONG_STEPS = ["train.steps=3", "train.global_batch_size=64", "checkpoint.every_steps=0"]
"""32 micro-batches on one rank."""


def test_a_step_longer_than_the_grace_period_is_left_between_two_micro_batches(configuration: str, tmp_path: Path):
    """The step that was under way is dropped: what is saved is the last whole one, and the rest is done after the resume."""
    options = [configuration, *LONG_STEPS, "health.grace_seconds=3"]
    assert run_main(1, tmp_path / "screens", [*options, f"run.dir={tmp_path}/whole"])[0] == [0]
    faults = Fault("slow", 1, delay_seconds=0.2), Fault("SIGTERM", 1, delay_seconds=0.5)
    statuses, screen = run_main(1, tmp_path / "screens", options, *faults)
    assert statuses == [85] and "stopped by SIGTERM at step 1; saved in" in screen
    assert seconds_to_leave(tmp_path / "screens") < 3 < 32 * 0.2
    assert run_main(1, tmp_path / "screens", options)[0] == [0]
    assert _losses(tmp_path / "run") == _losses(tmp_path / "whole")
    assert _same_state(_last(tmp_path / "run"), _last(tmp_path / "whole"))


def test_fold_finishes_the_step_because_its_momentum_has_taken_part_of_it(configuration: str, tmp_path: Path):
    options = [configuration, *LONG_STEPS, "parallel.engine=fold", "optimizer.name=tiger"]
    assert run_main(1, tmp_path / "screens", [*options, f"run.dir={tmp_path}/whole"])[0] == [0]
    faults = Fault("slow", 1, delay_seconds=0.02), Fault("SIGUSR1", 1, delay_seconds=0.1)
    statuses, screen = run_main(1, tmp_path / "screens", options, *faults)
    assert statuses == [85] and "stopped by SIGUSR1 at step 2; saved in" in screen
    assert run_main(1, tmp_path / "screens", options)[0] == [0]
    assert _same_state(_last(tmp_path / "run"), _last(tmp_path / "whole"))


def test_a_save_that_outlasts_the_grace_period_is_announced_with_what_is_kept(configuration: str, tmp_path: Path):
    """And then finished: only a kill by someone else ends it."""
    faults = Fault("slow-save", 5, delay_seconds=3), Fault("SIGTERM", 5)
    statuses, screen = run_main(1, tmp_path / "screens", [configuration, "health.grace_seconds=1"], *faults)
    checkpoints = tmp_path / "run/checkpoints"
    assert (
        "0.9 s after the stop signal the run is not saved yet (health.grace_seconds = 1); "
        f"the newest complete checkpoint is {checkpoints}/step-00000004\n"
    ) in screen
    assert statuses == [85] and "stopped by SIGTERM" in screen
    verify_checkpoint(_last(tmp_path / "run"))


def test_before_the_first_checkpoint_there_is_nothing_to_resume_from(configuration: str, tmp_path: Path):
    faults = Fault("slow-save", 2, delay_seconds=2), Fault("SIGTERM", 2)
    screen = run_main(1, tmp_path / "screens", [configuration, "health.grace_seconds=0.5"], *faults)[1]
    assert f"there is no complete checkpoint of this run in {tmp_path}/run/checkpoints\n" in screen


def test_a_stop_signal_to_the_command_reaches_the_ranks(configuration: str, tmp_path: Path):
    """`tiglon train --nproc 2` holds a torchrun, which waits health.grace_seconds for its ranks."""
    options = ["--nproc", "2", "train.steps=100000", "health.grace_seconds=97.5"]
    command = [sys.executable, "-m", "launch", "train", configuration, *options]
    with subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True) as process:
        while not list((tmp_path / "run/checkpoints").glob("step-*")):
            assert process.poll() is None
            time.sleep(0.05)
        rank = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0]
        environment = Path(f"/proc/{rank}/environ").read_text().split("\0")
        process.send_signal(signal.SIGUSR1)
        screen = process.communicate(timeout=60)[1]
    assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=98" in environment
    assert "stopped by SIGUSR1" in screen and "Traceback" not in screen
    assert process.returncode == 85
    assert not list((tmp_path / "run/checkpoints").glob(".step-*.partial"))


def test_a_gradient_that_is_no_number_on_one_rank_is_left_out_on_all(configuration: str, tmp_path: Path):
    options = ["health.replica_check_every_steps=1", "train.steps=8"]
    statuses, screen = run_main(2, tmp_path / "screens", [configuration, *options], Fault("nan", 4, rank=1))
    assert statuses == [0, 0], screen
    assert _health(tmp_path / "run") == [(5, "non-finite", "skip")]
    assert "step 5: the gradient is not finite; the update was left out" in screen
    skipped = {
        record["step"]: record["skipped"] for record in read_records(tmp_path / "run" / FILE_NAME) if record["kind"] == "train"
    }
    assert [step for step, value in skipped.items() if value] == [5]


def test_gradients_that_stay_sick_end_the_run_with_advice(configuration: str, tmp_path: Path):
    faults = [Fault("nan", step, rank=None) for step in (2, 3, 4)]
    statuses, screen = run_main(1, tmp_path / "screens", [configuration, "health.max_skipped_steps=3"], *faults)
    assert statuses == [1]
    assert "max_skipped_steps = 3 in a row, so the run is ended; lower the learning rate" in screen
    assert "Traceback" not in screen


SPIKES = ["health.spike_sigmas=6", "health.spike_window_steps=16", "train.steps=24", "checkpoint.every_steps=8"]


def test_a_spike_is_left_out(configuration: str, tmp_path: Path):
    options = [*SPIKES, "health.spike_action=skip"]
    statuses, screen = run_main(1, tmp_path / "screens", [configuration, *options], Fault("spike", 19, rank=None))
    assert statuses == [0], screen
    assert _health(tmp_path / "run") == [(20, "spike", "skip")]
    assert "above its running mean; the update was left out" in screen


def test_a_spike_rewinds_and_passes_over_the_batches(configuration: str, tmp_path: Path):
    options = [*SPIKES, "health.spike_action=rewind"]
    statuses, screen = run_main(1, tmp_path / "screens", [configuration, *options], Fault("spike", 19, rank=None))
    assert statuses == [0], screen
    assert (20, "spike", "rewind") in _health(tmp_path / "run")
    assert "going back to the last checkpoint" in screen
    steps = [record["step"] for record in read_records(tmp_path / "run" / FILE_NAME) if record["kind"] == "train"]
    assert steps == list(range(1, 25)), "what came before the rewind is no part of the curve"


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_stopped_after_a_rewind_passes_over_the_same_batches_and_remembers_it(
    configuration: str, tmp_path: Path, ranks: int
):
    """The checkpoint gone back to has its weights, but says to read the batches of the spike again."""
    options = [configuration, *SPIKES, "health.spike_action=rewind"]
    spike = Fault("spike", 19, rank=None)
    assert run_main(ranks, tmp_path / "screens", [*options, f"run.dir={tmp_path}/whole"], spike)[0] == [0] * ranks
    statuses, screen = run_main(ranks, tmp_path / "screens", options, spike, Fault("stop-after-rewind", 0, rank=ranks - 1))
    assert statuses == [85] * ranks and "stopped by SIGTERM at step 16; saved in" in screen, screen
    statuses, screen = run_main(ranks, tmp_path / "screens", options)
    assert statuses == [0] * ranks and "resumed from" in screen
    _assert_as_unbroken(tmp_path, [(20, "spike", "rewind")])


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rewind_goes_where_that_of_an_unbroken_run_goes_though_a_stop_has_saved_since(
    configuration: str, tmp_path: Path, ranks: int
):
    options = [configuration, *SPIKES, "health.spike_action=rewind"]
    spike = Fault("spike", 20, rank=None)
    assert run_main(ranks, tmp_path / "screens", [*options, f"run.dir={tmp_path}/whole"], spike)[0] == [0] * ranks
    statuses, screen = run_main(ranks, tmp_path / "screens", options, Fault("SIGTERM", 17, delay_seconds=0.0))
    stopped = int(_last(tmp_path / "run").name[-8:])
    assert statuses == [85] * ranks and 17 <= stopped <= 20, screen
    # counted from the start of the process
    statuses, screen = run_main(ranks, tmp_path / "screens", options, Fault("spike", 20 - stopped, rank=None))
    assert statuses == [0] * ranks and f"checkpoint of step {stopped} set aside: this run went back to before it" in screen
    _assert_as_unbroken(tmp_path, [(21, "spike", "rewind")])


@pytest.mark.slow
def test_a_stopped_rank_is_named_by_the_other_and_the_run_ends(configuration: str, tmp_path: Path):
    options = [configuration, "health.hang_seconds=8"]
    with pytest.raises(AssertionError, match="rank 1 failed:\nthe process died"):
        run_main(2, tmp_path / "screens", options, Fault("SIGSTOP", 4, rank=0))
    screen = (tmp_path / "screens/screen-1").read_text()
    assert "tiglon, rank 1: no progress for" in screen and "rank-0 has not responded for" in screen
    assert "all_reduce" in (tmp_path / "run/logs/rank-1.log").read_text(), "the stacks say where it waited"
    statuses, screen = run_main(2, tmp_path / "screens", [configuration])
    assert statuses == [0, 0] and _losses(tmp_path / "run").keys() == set(range(1, STEPS + 1))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_save_or_an_evaluation_longer_than_the_watchdog_waits_is_no_hang(
    configuration: str, corpus: Path, tmp_path: Path, ranks: int
):
    options = ["health.hang_seconds=3", f"data.validation={corpus}/shards/validation", "train.steps=8", "evaluate.tokens=512"]
    slow = [("slow-save", 4.0), ("slow-look", 1.0)]
    faults = [Fault(what, 3, rank=None, delay_seconds=seconds) for what, seconds in slow]
    statuses, screen = run_main(ranks, tmp_path / "screens", [configuration, *options], *faults)
    assert statuses == [0] * ranks, screen


def test_a_corrupted_weight_is_named_with_its_rank(configuration: str, tmp_path: Path):
    options = ["optimizer.name=tiger", "parallel.engine=fold", "health.replica_check_every_steps=2"]
    statuses, screen = run_main(2, tmp_path / "screens", [configuration, *options], Fault("flip", 4, rank=1))
    assert statuses == [1, 1]
    assert "step 6: replicas of" in screen and "rank 1 differs" in screen and "Traceback" not in screen
