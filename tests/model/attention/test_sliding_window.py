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


YARN = PositionConfig(kind="yarn", factor=4.0, rotated_factor=1.3, log_n="trained")


@pytest.mark.parametrize("window", [None, 4])
def test_a_layer_without_positions_has_log_n_where_it_is_full_and_nothing_of_the_map(window: int | None):
    config, layer = make_layer(1, sliding_window=window, num_hidden_layers=2, layers_without_positions=[-1])
    h = torch.randn(40, 16, dtype=torch.float64)
    bare, reference = make_layer(1, sliding_window=window, num_hidden_layers=2)
    none = PositionConfig(kind="none", log_n="trained")
    got = layer(h, positions_of(config, YARN))
    torch.testing.assert_close(got, reference(h, positions_of(bare, none)), rtol=0, atol=1e-14)
    assert (got - reference(h, positions_of(bare, YARN))).abs().max() > 1e-2


@pytest.mark.parametrize("position", [YARN, PositionConfig(kind="rerope", window=6)], ids=["yarn", "rerope"])
def test_windowed_layers_rotate_with_a_base_of_their_own(position: PositionConfig):
    settings = {"sliding_window": 9, "full_attention_layers": [-1], "num_hidden_layers": 2}
    h, own = torch.randn(40, 16, dtype=torch.float64), position.model_copy(update={"windowed_rope_theta": 50.0})
    config, windowed = make_layer(0, **settings)
    plain = windowed(h, positions_of(config, PositionConfig(rope_theta=50.0)))
    torch.testing.assert_close(windowed(h, positions_of(config, own)), plain, rtol=0, atol=1e-14)
    assert (windowed(h, positions_of(config, position)) - plain).abs().max() > 1e-2
    config, full = make_layer(1, **settings)
    torch.testing.assert_close(full(h, positions_of(config, own)), full(h, positions_of(config, position)), rtol=0, atol=0)
