"""Rotary keys of either spelling, in and out."""

import math
from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from model.huggingface.reader import ConfigReader
from model.huggingface.rope import read_layer_ropes, read_rope, written_layer_ropes, written_rope
from model.positions.config import PositionConfig
from model.positions.maps.yarn import yarn_mscale
from tests.model.huggingface.stock import LINEAR, LLAMA3, YARN

ROPES: dict[str, dict[str, Any]] = {
    "linear": LINEAR,
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn, untruncated": {**YARN, "truncate": False, "beta_fast": 8.0, "beta_slow": 0.5},
    "yarn, own factor": {**YARN, "attention_factor": 1.0},
    "yarn, mscale": {**YARN, "mscale": 0.5, "mscale_all_dim": 1.0},
}
SIZE, LENGTH = 16, 128


def read(values: dict[str, Any], latent: bool = False) -> tuple[PositionConfig, int]:
    position, length = read_rope(ConfigReader(values, {}, "config.json"), LENGTH, 1e4, latent)
    return PositionConfig.model_validate(position), length


@pytest.mark.parametrize("name", ROPES)
def test_frequencies_and_factor_are_those_of_transformers(name: str):
    rope = ROPES[name]
    config = transformers.LlamaConfig(
        hidden_size=64, num_attention_heads=4, max_position_embeddings=LENGTH, rope_parameters=dict(rope)
    )
    theirs, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config)
    position, length = read({"rope_parameters": rope})
    one = position.map.near_rotation(torch.ones((), dtype=torch.float64))
    ours = position.map.frequencies(SIZE, position.trained_length or length) * one
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-5, atol=0.0)
    assert position.map.query_scale() * position.map.rotated_factor() ** 2 == pytest.approx(factor**2, rel=1e-12)


@pytest.mark.parametrize("name", ROPES)
def test_both_spellings_say_the_same(name: str):
    rope = ROPES[name]
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "rope_type")}
    older = {"rope_theta": rope["rope_theta"], "rope_scaling": {**scaling, "type": rope["rope_type"]}}
    assert read(older) == read({"rope_parameters": rope}) == read({"rope_parameters": rope, "rope_theta": 77.0})


def test_what_is_left_out_counts_as_it_does_in_transformers():
    assert read({}) == (PositionConfig(), LENGTH)
    assert read({"rope_theta": 5e5, "rope_scaling": None})[0].rope_theta == 5e5
    shorter = {key: value for key, value in YARN.items() if key != "original_max_position_embeddings"}
    assert read({"rope_scaling": shorter})[0].trained_length == LENGTH, "max_position_embeddings, not that over the factor"


def test_latent_attention_has_a_factor_for_the_whole_head_and_one_for_its_rotated_part():
    factor = YARN["factor"]
    for extra, whole, rotated in (
        ({}, 1.0, yarn_mscale(factor)),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, yarn_mscale(factor), 1.0),
        ({"mscale": 0.5, "mscale_all_dim": 0.8}, yarn_mscale(factor, 0.8), yarn_mscale(factor, 0.5) / yarn_mscale(factor, 0.8)),
        ({"attention_factor": 1.2}, 1.0, 1.2),
    ):
        position, _ = read({"rope_parameters": {**YARN, **extra}}, latent=True)
        assert position.map.query_scale() == pytest.approx(whole**2)
        assert position.map.rotated_factor() == pytest.approx(rotated)
    assert yarn_mscale(4.0) == 1 + 0.1 * math.log(4.0) and yarn_mscale(1.0) == 1.0


@pytest.mark.parametrize(
    "rope, words",
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_parameters.rope_type = 'dynamic'"),
        ({"rope_type": "linear"}, "rope_parameters.factor is missing or null"),
        ({"rope_type": "linear", "factor": 0.5}, "rope_parameters.factor = 0.5 must be at least 1"),
        ({"rope_type": "linear", "factor": 2.0, "mscale_all_dim": 1.0}, "rope_parameters.mscale_all_dim = 1.0 is not known"),
        ({"rope_type": "yarn", "factor": 2.0, "truncate": 1}, "rope_parameters.truncate = 1 must be true or false"),
        ({**LLAMA3, "low_freq_factor": 4.0}, "rope_parameters.low_freq_factor = 4.0 must be below high_freq_factor"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "rope_parameters.partial_rotary_factor = 0.5"),
    ],
)
def test_what_tiglon_does_not_compute_is_refused_by_name(rope: dict[str, Any], words: str):
    with pytest.raises(ValueError, match="config.json: " + words.replace(".", r"\.")):
        read({"rope_parameters": rope})


def test_bases_of_two_kinds_of_layers():
    def layers(values: dict[str, Any]) -> dict[str, Any]:
        return read_layer_ropes(ConfigReader(values, {}, "config.json"), LENGTH, (1e6, 1e4), "local")[0]

    assert layers({}) == {"kind": "rope", "rope_theta": 1e6, "windowed_rope_theta": 1e4}
    assert layers({"rope_theta": 5e5, "local": 5e3}) == {"kind": "rope", "rope_theta": 5e5, "windowed_rope_theta": 5e3}
    for rope in ({"full_attention": LINEAR}, {"sliding_attention": {"rope_theta": 7.0}, "full_attention": LINEAR}):
        found = layers({"rope_parameters": rope})
        assert found["windowed_rope_theta"] == rope.get("sliding_attention", {}).get("rope_theta", 1e4)
        position = PositionConfig.model_validate(found)
        out = written_layer_ropes(position, position.map.rope_parameters("gqa", SIZE, LENGTH) or {}, "local")
        assert layers(out) == found
    with pytest.raises(ValueError, match="must have the objects full_attention and sliding_attention"):
        layers({"rope_parameters": {"factor": 2}})


def test_plain_positions_are_written_without_scaling():
    assert written_rope({"rope_type": "default", "rope_theta": 5e3}) == {
        "rope_theta": 5e3,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e3},
    }
