"""What an interleaved rank has sent is waited for early: it changes nothing, stops nothing and keeps little."""

from copy import deepcopy
from typing import Any
from unittest import mock

import pytest
import torch

from benchmarks.collectives import BASE, INTERLEAVED
from benchmarks.plan_check import _Batch
from launch.engine import build_engine
from launch.load_config import build_config
from model.parallel.mesh import make_mesh
from tests.ranks import run_ranks
from trainer.engines import torch_pipelining
from trainer.engines.torch_pipelining import SENDS_IN_FLIGHT

EVERYTHING = 1_000
"""Messages in flight: more than an update has, which is what torch does."""


def _train(rank: int, ranks: int, limits: tuple[int, ...]) -> list[tuple[list[float], list[float], int]]:
    """Losses, weights and the most messages in flight, of two updates of 8 micro-batches for each limit."""
    options = [f"parallel.pipeline_parallel_size={ranks}", "parallel.engine=fold", *INTERLEAVED, "train.global_batch_size=8"]
    config, found = build_config(deepcopy(BASE), [*options, "model.num_hidden_layers=6"]), []
    mesh = make_mesh(1, torch.device("cpu"), pipeline_parallel_size=ranks)
    start, kept = torch_pipelining._Sends.start, [0]

    def watched(sends: Any, messages: Any) -> None:
        start(sends, messages)
        kept.append(len(sends._works))

    for limit in limits:
        kept.clear()
        engine, generator = build_engine(config, mesh), torch.Generator().manual_seed(0)
        with (
            mock.patch.object(torch_pipelining, "SENDS_IN_FLIGHT", limit),
            mock.patch.object(torch_pipelining._Sends, "start", watched),
        ):
            losses = []
            for _ in range(2):
                loss = engine.accumulate([_Batch(config, generator) for _ in range(8)])
                assert loss is not None
                losses.append(float(loss))
                engine.update(1e-3)
        weights = torch.cat([fragment.values for fragment in engine.fragments()]).tolist()
        engine.close()
        found.append((losses, weights, max(kept)))
    return found


@pytest.mark.parametrize("ranks", [2, 3])
def test_waiting_for_messages_changes_no_bit(ranks: int):
    """Nor does waiting for each at once stop the ranks."""
    for whole, few, none in run_ranks(_train, ranks, (EVERYTHING, SENDS_IN_FLIGHT, 0)):
        assert whole[:2] == few[:2] == none[:2]
        assert (few[2], none[2]) == (SENDS_IN_FLIGHT, 0) and whole[2] >= 16  # each of two stages sends 8 times or 16
