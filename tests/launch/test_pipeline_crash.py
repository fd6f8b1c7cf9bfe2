"""A rank of a pipeline is killed in the middle of its passes: the run resumes, and ends with the bits of a whole one."""

import signal
import time
from pathlib import Path

import pytest

from launch.checkpoints import find_checkpoint, read_tensor, tensor_names
from launch.exit_status import Status
from tests.launch.test_run_end import Command
from tests.launch.test_train import losses

STAGED = (
    "parallel.pipeline_parallel_size=2", "model.num_hidden_layers=4", "train.global_batch_size=64", "--nproc", "2",
)  # fmt: skip
"""32 micro-batches per update: hardly a moment is outside of a schedule."""


def kill(command: Command, rank: int, step: int) -> None:
    """In the updates after the checkpoint of a step."""
    command.read_until(f"checkpoint of step {step} complete")
    time.sleep(0.1)
    command.ranks()[rank].kill()


@pytest.mark.slow
@pytest.mark.parametrize(("killed", "schedule"), [(0, "interleaved"), (1, "1f1b")])
def test_a_rank_killed_twice_is_restarted_and_then_named_and_the_run_ends_with_the_same_bits(
    configuration: str, tmp_path: Path, killed: int, schedule: str
):
    options = (configuration, *STAGED, f"parallel.pipeline_schedule={schedule}")
    assert Command(*options, f"run.dir={tmp_path}/whole").end() == Status.DONE
    command = Command(*options, "--max-restarts", "1")
    kill(command, killed, step=4)
    kill(command, killed, step=8)
    assert command.end() == 128 + signal.SIGKILL, command.screen
    assert f"\nthe ranks were started again (restart 1): rank {killed} was killed (SIGKILL)\n" in command.screen, command.screen
    assert f"\ntiglon: rank {killed} was killed (SIGKILL)" in command.screen and "Traceback" not in command.screen
    assert "\nresumed from " in command.screen
    assert Command(*options).end() == Status.DONE
    assert losses(tmp_path / "run") == losses(tmp_path / "whole") and len(losses(tmp_path / "run")) == 12
    ends = [Path(find_checkpoint(tmp_path / name)) for name in ("run", "whole")]
    assert [end.name for end in ends] == ["step-00000012"] * 2 and tensor_names(ends[0]) == tensor_names(ends[1])
    assert all(read_tensor(ends[0], name).equal(read_tensor(ends[1], name)) for name in tensor_names(ends[0]))
