"""YaRN's frequencies against the table of the post and transformers, and its scales of queries and keys."""

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from model.positions.config import PositionConfig
from model.positions.log_n import query_scale


@pytest.mark.parametrize(
    "settings, golden",
    [
        ({"kind": "yarn"}, [1, 0.0326778756, 0.00125, 0.000125]),
        ({"kind": "yarn", "yarn_ramp": "index"}, [1, 0.05625, 0.00125, 0.000125]),
    ],
)
def test_frequencies_of_the_posts(settings, golden):
    """d = 8, base 1e4, s = 8, trained at 512 (Su 2023, kexue.fm/archives/9948)."""
    got = PositionConfig(factor=8, **settings).map.frequencies(8, 512)
    torch.testing.assert_close(got, torch.tensor(golden, dtype=torch.float64), rtol=1e-8, atol=0)


def test_yarn_scales_the_logits():
    scale = query_scale(PositionConfig(kind="yarn", factor=8), torch.tensor([0]), 512)
    assert float(scale) == pytest.approx(1.45912908, rel=1e-8)


OWN = {"beta_fast": 9.0, "beta_slow": 2.0, "attention_factor": 1.1}
PARAMETERS = {"rope_type": "yarn", "rope_theta": 5e3, "factor": 4.0, "original_max_position_embeddings": 512}


def index_map(**keys) -> PositionConfig:
    """YaRN as Hugging Face has it: the ramp in the index."""
    return PositionConfig(kind="yarn", rope_theta=5e3, factor=4.0, yarn_ramp="index", **keys)


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize("own", [{}, OWN], ids=["defaults", "own"])
def test_frequencies_and_factor_are_those_of_transformers(own: dict, truncate: bool):
    """Rounding the ends of the ramp moves a frequency by several percent, other betas by more."""
    theirs = LlamaConfig(
        hidden_size=256, num_attention_heads=4, max_position_embeddings=2048,
        rope_parameters={**PARAMETERS, **own, "truncate": truncate},
    )  # fmt: skip
    want, factor = ROPE_INIT_FUNCTIONS["yarn"](theirs, "cpu")
    position = index_map(**own, yarn_truncate=truncate)
    torch.testing.assert_close(position.map.frequencies(64, 512).float(), want, rtol=1e-6, atol=0)
    assert position.map.query_scale() == pytest.approx(factor**2, rel=1e-12)
    other = index_map(**own, yarn_truncate=not truncate).map.frequencies(64, 512).float()
    assert ((other / want - 1).abs() > 1e-2).any()


def test_the_ramp_in_rotations_lies_between_the_betas():
    position = PositionConfig(kind="yarn", factor=4.0, beta_fast=9.0, beta_slow=2.0)
    plain = PositionConfig().map.frequencies(64, 512)
    turns, share = plain * 512 / (2 * math.pi), position.map.frequencies(64, 512) / plain
    between = (turns > 2) & (turns < 9)
    assert between.sum() >= 3
    want = torch.where(turns > 9, 1.0, torch.where(between, 0.25 + 0.75 * (turns - 2) / 7, 0.25))
    torch.testing.assert_close(share, want, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "attention, keys, own",
    [
        ("gqa", {}, {}),
        ("gqa", {"attention_factor": 1.5, "rotated_factor": 0.5}, {"attention_factor": 0.75}),
        ("gqa", {"yarn_truncate": False}, {"truncate": False}),
        ("mla", {}, {"attention_factor": 1.0, "mscale_all_dim": 1.0}),
        ("mla", {"attention_factor": 1.0, "rotated_factor": 1.2}, {"attention_factor": 1.2}),
        ("mla", {"attention_factor": 1 + 0.05 * math.log(4)}, {"attention_factor": 1.0, "mscale_all_dim": 0.5}),
    ],
)
def test_what_acts_is_written_for_hugging_face(attention: str, keys: dict, own: dict):
    written = index_map(**keys).map.rope_parameters(attention, 64, 512)
    assert written == {**PARAMETERS, "beta_fast": 32.0, "beta_slow": 1.0, **{k: pytest.approx(v) for k, v in own.items()}}


def test_what_hugging_face_cannot_say_is_not_written():
    assert PositionConfig(kind="yarn", factor=4.0).map.rope_parameters("gqa", 64, 512) is None
    unscaled = PositionConfig(kind="yarn", yarn_ramp="index", attention_factor=1.3)
    assert unscaled.map.rope_parameters("mla", 64, 512) is None
