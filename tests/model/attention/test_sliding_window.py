"""What windowed layers see, and the positions of full layers beside them."""

import pytest
import torch

from model.positions.config import PositionConfig
from tests.model.oracle import make_layer, positions_of


def test_windowed_layers_see_exactly_their_window():
    """(w - 1) * layers + 1 tokens of receptive field (Su 2023, kexue.fm/archives/9603)."""
    config, _ = make_layer(sliding_window=3, full_attention_layers=[-1], num_hidden_layers=5)
    layers = [make_layer(layer, sliding_window=3, full_attention_layers=[-1], num_hidden_layers=5)[1] for layer in range(4)]
    h = torch.randn(20, 16, dtype=torch.float64, requires_grad=True)
    x = h
    for layer in layers:
        x = x + layer(x, positions_of(config, batch=1))
    x[-1].sum().backward()
    assert (h.grad.abs().sum(-1) > 0).tolist() == [False] * 11 + [True] * 9


@pytest.mark.parametrize("pattern", ["same", "none"])
def test_full_layers_of_the_pattern(pattern):
    settings = {"sliding_window": 4, "full_attention_layers": [-1], "num_hidden_layers": 3, "full_attention_position": pattern}
    h = torch.randn(40, 16, dtype=torch.float64)
    switched = PositionConfig(kind="rerope", window=6, log_n="inference")
    for index in range(3):
        config, layer = make_layer(index, **settings)
        bare, reference = make_layer(index)
        got = layer(h, positions_of(config, switched))
        if index < 2:  # windowed: plain rotation, no log n
            torch.testing.assert_close(got, layer(h, positions_of(config)), rtol=0, atol=0)
        elif pattern == "same":
            torch.testing.assert_close(got, reference(h, positions_of(bare, switched)), rtol=0, atol=1e-14)
        else:
            none = PositionConfig(kind="none", log_n="inference")
            torch.testing.assert_close(got, reference(h, positions_of(bare, none)), rtol=0, atol=1e-14)
