"""How matrices start, and what a layer of one rank holds of the residual stream."""

import math

import pytest
import torch

from model.parallel.layers import Kit
from model.parameters import Constant, Normal
from model.sublayer import Execution, StreamConfig, Sublayer


def test_the_last_matrix_of_a_sublayer_starts_as_configured():
    def initial(how: str):
        return StreamConfig.model_validate({"residual_init": how, "num_hidden_layers": 8}).residual_initial

    assert initial("plain") == Normal(0.02)
    assert initial("scaled") == Normal(0.02 / math.sqrt(16))
    assert initial("zero") == Constant(0.0, 0.02 / math.sqrt(16)), "and is expected to reach what a scaled one has"


def test_matrices_multiply_and_gains_do_not():
    layer = Sublayer(StreamConfig(hidden_size=6), Kit())
    layer.linear, layer.norm = layer.kit.column(6, 10, Normal(1.0), "mlp"), layer.kit.norm(6, 1e-5, False)
    assert layer.matrix_flops() == 2 * 60 and layer.whole_inputs() == [6]
    assert layer.linear(torch.ones(3, 6)).shape == (3, 10)


def test_a_kind_that_states_no_cost_is_seen():
    layer = Sublayer(StreamConfig(), Kit())
    for ask in (layer.pointwise_elements, lambda: layer.kept(Execution(2), 16)):
        with pytest.raises(NotImplementedError):
            ask()


def test_sequence_parallel_ranks_share_the_stream():
    assert [Execution(2, 4, split).stream(64) for split in (False, True)] == [64, 16]
