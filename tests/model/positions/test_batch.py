"""Positions of a batch: indices by document, offset and padding; scales; dtypes."""

import math

import pytest
import torch

from model.config import ModelConfig
from model.positions.batch import Positions, TokenLayout, make_positions
from model.positions.config import PositionConfig

MODEL = ModelConfig(hidden_size=16, num_attention_heads=2, head_dim=8)


def positions_of(tokens: TokenLayout, dtype: torch.dtype = torch.float64, **position) -> Positions:
    return make_positions(PositionConfig(**position), MODEL, tokens, 8, "cpu", dtype)


@pytest.mark.parametrize(
    "tokens, indices",
    [
        (TokenLayout(2, 4), [[0, 1, 2, 3]]),
        (TokenLayout(2, 3, offset=5), [[5, 6, 7]]),
        (TokenLayout(2, 4, torch.tensor([0, 3, 4, 8])), [[0, 1, 2, 0], [0, 1, 2, 3]]),
        (TokenLayout(2, 2, offset=4, starts_B=torch.tensor([0, 3])), [[4, 5], [1, 2]]),
    ],
    ids=["rows", "offset", "documents", "padded"],
)
def test_log_n_counts_from_the_start_of_the_document(tokens: TokenLayout, indices: list[list[int]]):
    scale = positions_of(tokens, log_n="trained").query_scale
    want = [[math.log(index + 1) / math.log(8) for index in row] for row in indices]
    torch.testing.assert_close(scale, torch.tensor(want, dtype=torch.float64))


def test_windowed_layers_have_the_scale_of_yarn_without_log_n():
    tokens, both = TokenLayout(1, 6), {"kind": "yarn", "factor": 4.0, "log_n": "trained"}
    positions = positions_of(tokens, **both)
    yarn = (1 + 0.1 * math.log(4)) ** 2
    torch.testing.assert_close(positions.windowed_query_scale, torch.full((1, 6), yarn, dtype=torch.float64))
    log_n = positions_of(tokens, log_n="trained")
    torch.testing.assert_close(positions.query_scale, yarn * log_n.query_scale)
    assert log_n.windowed_query_scale is None


def test_windowed_layers_with_a_base_of_their_own_have_plain_rope():
    tokens = TokenLayout(1, 6, offset=3)
    yarn = {"kind": "yarn", "factor": 4.0, "rotated_factor": 1.3, "log_n": "trained"}
    positions, shared = positions_of(tokens, **yarn, windowed_rope_theta=100.0), positions_of(tokens, **yarn)
    plain = positions_of(tokens, rope_theta=100.0).near_key
    torch.testing.assert_close(positions.windowed_near_key.cos, plain.cos, rtol=0, atol=0)
    torch.testing.assert_close(positions.windowed_near_key.sin, plain.sin, rtol=0, atol=0)
    torch.testing.assert_close(positions.near_key.cos, shared.near_key.cos, rtol=0, atol=0)
    assert positions.windowed_query_scale is None and shared.windowed_query_scale is not None
    torch.testing.assert_close(positions.query_scale, shared.query_scale, rtol=0, atol=0)
    torch.testing.assert_close(shared.windowed_near_key.cos, shared.near_key.cos, rtol=0, atol=0)
    assert positions_of(tokens, kind="none", windowed_rope_theta=100.0).windowed_near_key is not None


def test_layers_without_positions_have_log_n_and_no_factor_of_the_map():
    both = {"kind": "yarn", "factor": 4.0, "log_n": "trained"}
    tokens, yarn = TokenLayout(1, 6), (1 + 0.1 * math.log(4)) ** 2
    positions = positions_of(tokens, **both)
    torch.testing.assert_close(yarn * positions.unrotated_query_scale, positions.query_scale)
    assert positions_of(tokens, kind="yarn", factor=4.0).unrotated_query_scale is None


def test_the_trained_length_of_the_position_comes_first():
    scale = positions_of(TokenLayout(1, 4), log_n="trained", trained_length=4).query_scale
    assert scale is not None and float(scale[0, -1]) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "dtype, wide", [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)]
)
def test_caches_and_scales_are_float32_or_wider(dtype: torch.dtype, wide: torch.dtype):
    positions = positions_of(TokenLayout(1, 4), dtype, log_n="trained")
    assert positions.near_key is not None and positions.query_scale is not None
    assert positions.near_key.cos.dtype == positions.query_scale.dtype == wide


def test_which_rotations_a_map_has():
    def kinds(**position) -> tuple[bool, bool, bool]:
        positions = positions_of(TokenLayout(1, 4), **position)
        return positions.near_key is not None, positions.far_query is not None, positions.far_key is not None

    assert kinds() == (True, False, False)
    assert kinds(kind="none") == (False, False, False)
    assert kinds(kind="rerope", window=2) == (True, True, False)
    assert kinds(kind="leaky-rerope", window=2, leak=4) == (True, True, True)


def test_a_sequence_within_the_window_has_no_far_pairs():
    def far(sequence: int, offset: int = 0) -> bool:
        return positions_of(TokenLayout(1, sequence, offset=offset), kind="rerope", window=4).has_far_pairs

    assert not far(4) and far(5) and not far(1, offset=3) and far(1, offset=4)
    assert not positions_of(TokenLayout(1, 99)).has_far_pairs
