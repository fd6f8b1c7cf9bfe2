"""Position maps: golden tables, limits, and the two-region tables against the map itself."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from model.config import ModelConfig, PositionConfig
from model.positions import frequencies, query_factor, readable_length, reading, relative, rotate
from tests.model.oracle import MAPS, turn_pairs

MODEL = ModelConfig(hidden_size=16, num_attention_heads=2, head_dim=8)


def read(position, sequence, offset=0, dtype=torch.float64, **rest):
    return reading(position, MODEL, 1, sequence, None, "cpu", dtype, 512, offset=offset, **rest)


@pytest.mark.parametrize(
    "settings, golden",
    [
        ({"kind": "ntk"}, [1, 0.05, 0.0025, 0.000125]),
        ({"kind": "ntk-mixed", "mixed_exponent": 1}, [0.594603558, 0.0353553391, 0.00210224104, 0.000125]),
        ({"kind": "ntk-mixed"}, [0.417154981, 0.0259668095, 0.00176005376, 0.000125]),
        ({"kind": "ntk-mixed", "mixed_exponent": 0.75}, [0.479412632, 0.0290415292, 0.00187143605, 0.000125]),
        ({"kind": "ntk-mixed", "mixed_exponent": 0}, [0.125, 0.0125, 0.00125, 0.000125]),
        ({"kind": "yarn"}, [1, 0.0326778756, 0.00125, 0.000125]),
        ({"kind": "yarn", "yarn_ramp": "index"}, [1, 0.05625, 0.00125, 0.000125]),
    ],
)
def test_frequencies_of_the_posts(settings, golden):
    """d = 8, base 1e4, s = 8, trained at 512 (kexue 9675, 9706, 9948)."""
    found = frequencies(PositionConfig(factor=8, **settings), 8, 512)
    torch.testing.assert_close(found, torch.tensor(golden, dtype=torch.float64), rtol=1e-8, atol=0)


def test_log_n_of_the_post():
    n = torch.tensor([1, 2, 16, 512, 513, 1024, 4096])
    trained = query_factor(PositionConfig(log_n="trained"), n - 1, 512)
    clipped = query_factor(PositionConfig(log_n="inference"), n - 1, 512)
    want = torch.tensor([0, 0.1111, 0.4444, 1, 1.0003, 1.1111, 1.3333], dtype=torch.float64)
    torch.testing.assert_close(trained, want, rtol=0, atol=1e-4)
    torch.testing.assert_close(clipped, want.clamp(min=1), rtol=0, atol=1e-4)


def test_yarn_scales_the_logits():
    factor = query_factor(PositionConfig(kind="yarn", factor=8), torch.tensor([0]), 512)
    assert float(factor) == pytest.approx(1.45912908, rel=1e-8)


@settings(max_examples=60, deadline=None)
@given(
    window=st.integers(1, 60),
    leak=st.one_of(st.none(), st.floats(0.05, 40)),
    i=st.integers(0, 400),
    r=st.integers(0, 400),
)
def test_tables_turn_every_pair_by_the_map(window, leak, i, r):
    """R(query place) against R(key place) is R(relative(i - j)), near and far."""
    kind = {"kind": "rerope"} if leak is None else {"kind": "leaky-rerope", "leak": leak}
    position, r = PositionConfig(window=window, **kind), min(r, i)
    how = read(position, i + 1)
    x = torch.linspace(-1, 1, 8, dtype=torch.float64).view(1, 1, 1, 8)
    y = torch.linspace(2, -3, 8, dtype=torch.float64).view(1, 1, 1, 8)
    query, key = (how.near, how.near) if r < window else (how.far_query, how.far_key)
    turned_q = rotate(x, query.narrow(i, 1))
    turned_k = rotate(y, None if key is None else key.narrow(i - r, 1))
    angle = relative(position, torch.tensor(r)) * frequencies(position, 8, 512)
    assert float((turned_q * turned_k).sum()) == pytest.approx(float((turn_pairs(x, angle) * y).sum()), abs=1e-9)


def test_leak_of_one_is_rope_and_a_large_one_rerope():
    r = torch.arange(100)
    torch.testing.assert_close(relative(PositionConfig(kind="leaky-rerope", window=7, leak=1), r), r.double())
    almost = relative(PositionConfig(kind="leaky-rerope", window=7, leak=1e12), r)
    torch.testing.assert_close(almost, relative(PositionConfig(kind="rerope", window=7), r), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["rope", "yarn", "leaky", "inverse"])
def test_scores_depend_on_distance_alone(name):
    """Places moved by 1,000 change no score."""
    position = MAPS[name].model_copy(update={"log_n": "none"})
    x = torch.randn(2, 1, 20, 1, 8, dtype=torch.float64)
    scores = []
    for offset in (0, 1000):
        how = read(position, 20, offset)
        near = rotate(x[0], how.near)[0, :, 0] @ rotate(x[1], how.near)[0, :, 0].T
        far = near
        if how.window is not None:
            far = rotate(x[0], how.far_query)[0, :, 0] @ rotate(x[1], how.far_key)[0, :, 0].T
        scores.append(torch.stack((near, far)))
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=1e-10)


def test_angles_come_from_float64():
    """At 6,256, which inverse Leaky reaches, a float32 angle is off by 3e-4."""
    how = read(PositionConfig(), 8, offset=6250, dtype=torch.float32)
    exact = torch.outer(torch.arange(6250, 6258).double(), frequencies(PositionConfig(), 8, 512)).cos()
    assert how.near.cos.dtype == torch.float32
    assert (how.near.cos.double() - exact).abs().max() < 1e-7


def test_interleaved_pairs_are_a_permutation_of_channels():
    x, y = torch.randn(2, 1, 9, 1, 8, dtype=torch.float64)
    turn = read(PositionConfig(), 9).near
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])

    def scores(a, b, interleaved):
        return rotate(a, turn, None, interleaved)[0, :, 0] @ rotate(b, turn, None, interleaved)[0, :, 0].T

    torch.testing.assert_close(scores(x, y, True), scores(x[..., order], y[..., order], False), rtol=0, atol=1e-12)
    assert (scores(x, y, True) - scores(x, y, False)).abs().max() > 1e-2


def test_tables_made_while_decoding_serve_training():
    with torch.inference_mode():
        read(PositionConfig(rope_theta=777.0), 6)
    x = torch.randn(1, 6, 1, 8, dtype=torch.float64, requires_grad=True)
    rotate(x, read(PositionConfig(rope_theta=777.0), 6).near).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize(
    "read_with, trained_with, length",
    [
        (PositionConfig(), PositionConfig(), 512),
        (PositionConfig(kind="pi", factor=8), PositionConfig(), 511 * 8 + 1),
        (PositionConfig(kind="rerope", window=256), PositionConfig(), None),
        (PositionConfig(kind="rerope", window=512), PositionConfig(), 512),
        (PositionConfig(kind="leaky-rerope", window=128, leak=16), PositionConfig(), 128 + 383 * 16 + 1),
        (PositionConfig(), PositionConfig(kind="leaky-rerope", window=128, leak=1 / 16), 6257),
        (PositionConfig(kind="none"), PositionConfig(kind="none"), None),
    ],
)
def test_how_far_a_map_reads(read_with, trained_with, length):
    """Trained at 512; inverse Leaky w = 128, k = 1/16 meets distances up to 6,256 (kexue 9728)."""
    assert readable_length(read_with, trained_with, 512) == length


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"kind": "rerope", "window": 0}, "needs window >= 1"),
        ({"kind": "rerope"}, "needs window >= 1"),
        ({"kind": "leaky-rerope", "window": 4, "leak": 0}, "needs leak > 0"),
        ({"kind": "rope", "window": 4}, "window = 4 has no meaning"),
        ({"kind": "rope", "factor": 2}, "factor = 2.0 has no meaning"),
    ],
)
def test_bad_maps_are_refused_in_one_sentence(settings, sentence):
    with pytest.raises(ValidationError, match=sentence):
        PositionConfig(**settings)


def test_relative_is_continuous_and_rises():
    for position in MAPS.values():
        steps = relative(position, torch.arange(300)).diff()
        assert (steps >= 0).all()
        assert steps.max() <= 16 + 1e-9
    assert math.isclose(float(relative(MAPS["inverse"], torch.tensor(5))), 5.0)
