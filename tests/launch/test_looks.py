"""A look that fails is a message, on all ranks alike; on one rank alone it ends the run."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from launch.looks import Looks
from model.parallel import Topology, make_topology
from tests.ranks import run_ranks
from trainer.loop import RunEnded


def looks(topology: Topology, said: list[str], patience: float = 60.0) -> Looks:
    run: Any = SimpleNamespace(
        topology=topology, progress=SimpleNamespace(line=said.append), stop=SimpleNamespace(requested=None)
    )
    return Looks(run, patience)


def fail(error: BaseException) -> Any:
    raise error


def test_what_was_made_is_written():
    said, written = [], []
    looks(Topology(), said).attempt(3, "sample", lambda: "text", written.append)
    assert written == ["text"] and said == []


@pytest.mark.parametrize("error", [ValueError("no token\nof any kind"), IndexError("no token"), RuntimeError("no token")])
def test_an_error_is_a_message(error: Exception, capsys: pytest.CaptureFixture):
    said, written = [], []
    watched = looks(Topology(), said)
    watched.attempt(3, "evaluation", lambda: fail(error), written.append)
    watched.attempt(3, "sample", lambda: "text", lambda text: fail(error))
    wanted = [
        "step 3: the evaluation failed: no token; training is not affected",
        "step 3: the sample failed: no token; training is not affected",
    ]
    assert said == wanted and written == []
    assert capsys.readouterr().err.count("Traceback") == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), RunEnded("over")])
def test_what_ends_a_run_passes(error: BaseException):
    said: list[str] = []
    with pytest.raises(type(error)):
        looks(Topology(), said).attempt(3, "evaluation", lambda: fail(error), print)
    assert said == []


def together(rank: int, world_size: int, first: bool) -> list[str]:
    """Both ranks fail (rank 1 later), or rank 0 alone."""
    topology, said = make_topology(1, torch.device("cpu")), []
    watched = looks(topology, said, patience=60.0 if first else 2.0)

    def make() -> float:
        if rank == 0 or first:
            raise ValueError(f"rank {rank}")
        return 1.0

    try:
        watched.attempt(3, "evaluation", make, lambda made: None)
    except RunEnded as ended:
        said.append(str(ended))
    else:
        if first:  # collectives are in step again
            said.append(str(float(topology.sum(torch.ones(()), topology.world_group))))
    return said


def test_ranks_that_fail_alike_go_on_together():
    for rank, said in enumerate(run_ranks(together, 2, True)):
        assert said == [f"step 3: the evaluation failed: rank {rank}; training is not affected", "2.0"]


def test_a_rank_that_fails_alone_ends_the_run():
    said = run_ranks(together, 2, False)
    assert said[1] == [] and said[0][1].startswith("step 3: the evaluation failed on rank 0 but not on all (rank 0)")
