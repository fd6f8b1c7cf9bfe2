"""Rotary caches against the relative positions they stand for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import ModelConfig
from model.positions.batch import Positions, TokenLayout, make_positions
from model.positions.config import PositionConfig
from model.positions.rope import apply_rotary
from tests.model.oracle import MAPS, rotate_pairs

MODEL = ModelConfig(hidden_size=16, num_attention_heads=2, head_dim=8)


def positions_of(position: PositionConfig, sequence: int, offset: int = 0, dtype: torch.dtype = torch.float64) -> Positions:
    return make_positions(position, MODEL, TokenLayout(1, sequence, offset=offset), 512, "cpu", dtype)


@settings(max_examples=60, deadline=None)
@given(
    window=st.integers(1, 60),
    leak=st.one_of(st.none(), st.floats(0.05, 40)),
    i=st.integers(0, 400),
    r=st.integers(0, 400),
)
def test_caches_rotate_every_pair_by_the_map(window, leak, i, r):
    """R of the query against R of the key is R(relative_position(i - j)), near and far."""
    kind = {"kind": "rerope"} if leak is None else {"kind": "leaky-rerope", "leak": leak}
    position, r = PositionConfig(window=window, **kind), min(r, i)
    positions = positions_of(position, i + 1)
    x = torch.linspace(-1, 1, 8, dtype=torch.float64).view(1, 1, 1, 8)
    y = torch.linspace(2, -3, 8, dtype=torch.float64).view(1, 1, 1, 8)
    query, key = (positions.near_query, positions.near_key) if r < window else (positions.far_query, positions.far_key)
    rotated_q = apply_rotary(x, query.narrow(i, 1))
    rotated_k = apply_rotary(y, None if key is None else key.narrow(i - r, 1))
    angle = position.map.relative_position(torch.tensor(r)) * position.map.frequencies(8, 512)
    assert float((rotated_q * rotated_k).sum()) == pytest.approx(float((rotate_pairs(x, angle) * y).sum()), abs=1e-9)


@pytest.mark.parametrize("name", ["rope", "yarn", "leaky", "inverse"])
def test_scores_depend_on_distance_alone(name):
    """An offset of 1,000 changes no score."""
    position = MAPS[name].model_copy(update={"log_n": "none"})
    x = torch.randn(2, 1, 20, 1, 8, dtype=torch.float64)
    scores = []
    for offset in (0, 1000):
        positions = positions_of(position, 20, offset)
        near = apply_rotary(x[0], positions.near_query)[0, :, 0] @ apply_rotary(x[1], positions.near_key)[0, :, 0].T
        far = near
        if positions.window is not None:
            far = apply_rotary(x[0], positions.far_query)[0, :, 0] @ apply_rotary(x[1], positions.far_key)[0, :, 0].T
        scores.append(torch.stack((near, far)))
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=1e-10)


def test_angles_come_from_float64():
    """At 6,256, which inverse Leaky reaches, a float32 angle is off by 3e-4."""
    positions = positions_of(PositionConfig(), 8, offset=6250, dtype=torch.float32)
    exact = torch.outer(torch.arange(6250, 6258).double(), PositionConfig().map.frequencies(8, 512)).cos()
    assert positions.near_key.cos.dtype == torch.float32
    assert (positions.near_key.cos.double() - exact).abs().max() < 1e-7


def test_what_is_rotated_is_scaled_on_both_sides():
    """Queries and keys each, so scores by the square."""
    x, y = torch.randn(2, 1, 9, 1, 8, dtype=torch.float64)
    plain, scaled = (
        positions_of(PositionConfig(kind="yarn", factor=4.0, rotated_factor=factor), 9).near_key for factor in (1.0, 1.3)
    )
    scores = [apply_rotary(x, cache)[0, :, 0] @ apply_rotary(y, cache)[0, :, 0].T for cache in (plain, scaled)]
    torch.testing.assert_close(scores[1], 1.69 * scores[0])


def test_interleaved_pairs_are_a_permutation_of_channels():
    x, y = torch.randn(2, 1, 9, 1, 8, dtype=torch.float64)
    rotary = positions_of(PositionConfig(), 9).near_key
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])

    def scores(a, b, interleaved):
        return apply_rotary(a, rotary, None, interleaved)[0, :, 0] @ apply_rotary(b, rotary, None, interleaved)[0, :, 0].T

    torch.testing.assert_close(scores(x, y, True), scores(x[..., order], y[..., order], False), rtol=0, atol=1e-12)
    assert (scores(x, y, True) - scores(x, y, False)).abs().max() > 1e-2


def test_caches_made_while_decoding_serve_training():
    with torch.inference_mode():
        positions_of(PositionConfig(rope_theta=777.0), 6)
    x = torch.randn(1, 6, 1, 8, dtype=torch.float64, requires_grad=True)
    apply_rotary(x, positions_of(PositionConfig(rope_theta=777.0), 6).near_key).sum().backward()
    assert x.grad is not None
