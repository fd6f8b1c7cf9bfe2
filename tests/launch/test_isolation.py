"""An observation that fails is a message if it fails on all ranks; on one rank alone it ends the run."""

from typing import Any

import pytest
import torch

from launch.isolation import ObservationRunner
from model.parallel.mesh import Mesh, make_mesh
from tests.ranks import run_ranks
from trainer.monitoring.signals import StopSignal
from trainer.session import RunEnded


def runner(mesh: Mesh, lines: list[str], patience: float = 60.0) -> ObservationRunner:
    return ObservationRunner(mesh.world, lines.append, StopSignal(), patience_seconds=patience)


def fail(error: BaseException) -> Any:
    raise error


def test_what_was_computed_is_written():
    lines, written = [], []
    runner(Mesh(), lines).run(3, "sample", lambda: "text", written.append)
    assert written == ["text"] and lines == []


@pytest.mark.parametrize("error", [ValueError("no token\nof any kind"), IndexError("no token"), RuntimeError("no token")])
def test_an_error_is_a_message(error: Exception, capsys: pytest.CaptureFixture):
    lines, written = [], []
    observations = runner(Mesh(), lines)
    observations.run(3, "evaluation", lambda: fail(error), written.append)
    observations.run(3, "sample", lambda: "text", lambda text: fail(error))
    wanted = [
        "step 3: the evaluation failed: no token; training is not affected",
        "step 3: the sample failed: no token; training is not affected",
    ]
    assert lines == wanted and written == []
    assert capsys.readouterr().err.count("Traceback") == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), RunEnded("over")])
def test_what_ends_a_run_passes(error: BaseException):
    lines: list[str] = []
    with pytest.raises(type(error)):
        runner(Mesh(), lines).run(3, "evaluation", lambda: fail(error), print)
    assert lines == []


def together(rank: int, world_size: int, first: bool) -> list[str]:
    """Both ranks fail (rank 1 later), or rank 0 alone."""
    mesh, lines = make_mesh(1, torch.device("cpu")), []
    observations = runner(mesh, lines, patience=60.0 if first else 2.0)

    def compute() -> float:
        if rank == 0 or first:
            raise ValueError(f"rank {rank}")
        return 1.0

    try:
        observations.run(3, "evaluation", compute, lambda result: None)
    except RunEnded as ended:
        lines.append(str(ended))
    else:
        if first:  # collectives are in step again
            lines.append(str(float(mesh.world.sum(torch.ones(())))))
    return lines


def test_ranks_that_all_fail_continue_together():
    for rank, lines in enumerate(run_ranks(together, 2, True)):
        assert lines == [f"step 3: the evaluation failed: rank {rank}; training is not affected", "2.0"]


def test_a_rank_that_fails_alone_ends_the_run():
    lines = run_ranks(together, 2, False)
    assert lines[1] == [] and len(lines[0]) == 1, "a run that ends is said to continue"
    assert lines[0][0].startswith("step 3: the evaluation failed on rank 0 but not on all (rank 0)")
