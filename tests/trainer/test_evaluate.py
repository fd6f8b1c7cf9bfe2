"""Held-out loss: one mean however it is cut and shared, and contexts that score the same tokens."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from model.config import ModelConfig, PositionConfig
from model.decoder import Decoder, initialise
from model.layers import serial
from model.parallel import Topology, make_topology
from tests.ranks import run_ranks
from trainer.evaluate import NOT_SCORED, evaluate, evaluate_contexts, last


@dataclass
class Rows:
    inputs_BS: torch.Tensor
    targets_BS: torch.Tensor
    cu_seqlens: torch.Tensor | None = None


def rows(count, length, seed=0):
    tokens = torch.randint(0, 40, (count, length + 1), generator=torch.Generator().manual_seed(seed))
    targets = tokens[:, 1:].clone()
    targets[0, : length // 2] = NOT_SCORED
    return Rows(tokens[:, :-1], targets)


def part(batch, which):
    return Rows(batch.inputs_BS[which], batch.targets_BS[which])


def make(position=None):
    config = ModelConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.3
    )
    decoder = Decoder(config, position or PositionConfig(), 16, serial(torch.float64))
    initialise(decoder, 0)
    return decoder


def share(rank, world_size):
    topology, batch = make_topology(1, torch.device("cpu")), rows(4, 12)
    mine = part(batch, slice(2 * rank, 2 * rank + 2))
    return evaluate(make(), [[mine]], topology)


def test_the_mean_does_not_depend_on_micro_batches_or_ranks():
    batch = rows(4, 12)
    whole = evaluate(make(), [[batch]], Topology())
    assert whole.tokens == 4 * 12 - 6
    cut = evaluate(make(), [[part(batch, slice(0, 1))], [part(batch, slice(1, 4))]], Topology())
    assert cut.loss == pytest.approx(whole.loss, rel=1e-14)
    for score in run_ranks(share, 2):
        assert score.tokens == whole.tokens
        assert score.loss == pytest.approx(whole.loss, rel=1e-14)


class Recorder(nn.Module):
    """A model that notes which targets are scored, in which context."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, inputs_BS, targets_BS, cu_seqlens=None, position=None):
        self.seen.append((inputs_BS.shape[1], targets_BS[targets_BS >= 0].tolist(), position))
        return torch.ones(()), (targets_BS >= 0).sum()


def test_contexts_score_the_same_last_tokens():
    model, batch, map_read = Recorder(), rows(3, 32), PositionConfig(kind="rerope", window=4)
    scores = list(evaluate_contexts(model, [[batch]], [8, 16, 32], Topology(), map_read))
    assert [score.context for score in scores] == [8, 16, 32]
    assert [score.tokens for score in scores] == [3 * 4] * 3
    expected = batch.targets_BS[:, -4:].flatten().tolist()
    assert model.seen == [(length, expected, map_read) for length in (8, 16, 32)]


def test_another_map_reads_differently_beyond_its_window_only():
    decoder, batch = make(), rows(2, 24)
    contexts = [6, 24]
    own = [score.loss for score in evaluate_contexts(decoder, [[batch]], contexts, Topology())]
    rerope = PositionConfig(kind="rerope", window=6)
    other = [score.loss for score in evaluate_contexts(decoder, [[batch]], contexts, Topology(), rerope)]
    assert own[0] == other[0]
    assert own[1] != other[1]


def test_documents_are_cut_with_the_rows():
    batch = rows(2, 10)
    batch.cu_seqlens = torch.tensor([0, 3, 7, 10, 15, 20], dtype=torch.int32)
    assert last(batch, 4, 2).cu_seqlens.tolist() == [0, 1, 4, 8]
    assert last(batch, 6, 2).cu_seqlens.tolist() == [0, 3, 6, 7, 12]
    assert last(batch, 10, 2).cu_seqlens.tolist() == [0, 3, 7, 10, 15, 20]


def test_bad_requests_are_one_sentence():
    batch = rows(2, 10)
    with pytest.raises(ValueError, match="context 11 must lie between 2 and 10 tokens"):
        list(evaluate_contexts(make(), [[batch]], [11], Topology()))
    batch.targets_BS.fill_(NOT_SCORED)
    with pytest.raises(ValueError, match="no token to score"):
        evaluate(make(), [[batch]], Topology())
