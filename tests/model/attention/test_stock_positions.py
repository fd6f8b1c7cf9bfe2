"""Logits of stock transformers under their maps: the same weights under the same names."""

import math
from typing import Any

import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from model.config import ModelConfig
from model.decoder import Decoder
from model.parallel.layers import serial_kit
from model.positions.config import PositionConfig
from tests.model.huggingface.stock import ALL, LLAMA3, SIZES, YARN, stock_logits, stock_model

CASES: dict[tuple[str, str], list[dict[str, Any]]] = {
    ("llama", "tied, llama3"): [{}, {"rope_parameters": {**LLAMA3, "low_freq_factor": 2.0, "high_freq_factor": 3.0}}],
    ("llama", "yarn"): [{}, {"rope_parameters": LLAMA3}],
    ("llama", "yarn, own factors"): [{}],
    ("llama", "yarn, mscale"): [{}],
    ("mistral", "window, yarn"): [{}],
    ("qwen3", "windows, yarn"): [{}],
    ("smollm3", "plain"): [{}, {"rope_parameters": YARN}, {"rope_parameters": YARN, "no_rope_layers": [0, 1, 1, 0]}],
    ("smollm3", "windows"): [{}, {"rope_parameters": {**YARN, "attention_factor": 1.4}}],
    ("deepseek_v2", "full-rank queries, yarn"): [{}, {"rope_parameters": {**YARN, "mscale": 0.5, "mscale_all_dim": 0.8}}],
    ("deepseek_v3", "yarn"): [{}],
    ("deepseek_v3", "tied, yarn, own mscale"): [{}],
    ("deepseek_v3", "yarn without mscale"): [{}, {"rope_parameters": {**YARN, "attention_factor": 1.3, "truncate": False}}],
}
ROWS = [(*case, changes) for case, all_changes in CASES.items() for changes in all_changes]
LATENT_KEYS = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def position_of(theirs: Any) -> dict[str, Any]:
    """[position] of a stock configuration; what multiplies rotated channels is asked of transformers."""
    rope = theirs.rope_parameters
    found = {"kind": rope["rope_type"], "rope_theta": rope["rope_theta"]}
    if found["kind"] == "default":
        return {**found, "kind": "rope"}
    found |= {"factor": rope["factor"], "trained_length": rope["original_max_position_embeddings"]}
    if found["kind"] == "llama3":
        return found | {key: rope[key] for key in ("low_freq_factor", "high_freq_factor")}
    found |= {key: rope[key] for key in ("beta_fast", "beta_slow") if rope.get(key)}
    found |= {"yarn_ramp": "index", "yarn_truncate": rope.get("truncate", True)}
    rotated = ROPE_INIT_FUNCTIONS["yarn"](theirs, "cpu")[1]
    if not hasattr(theirs, "kv_lora_rank"):
        given = any(key in rope for key in ("attention_factor", "mscale"))
        return {**found, "attention_factor": rotated} if given else found
    whole = 1 + 0.1 * rope.get("mscale_all_dim", 0) * math.log(rope["factor"])
    return {**found, "rotated_factor": rotated, "attention_factor": whole}


def model_of(theirs: Any) -> dict[str, Any]:
    """[model] of a stock configuration."""
    found = {key: getattr(theirs, key) for key in SIZES if key in ModelConfig.model_fields}
    found |= {"tie_word_embeddings": theirs.tie_word_embeddings, "tied_head": "plain"}
    if hasattr(theirs, "kv_lora_rank"):
        return {**found, "attention": "mla", **{key: getattr(theirs, key) for key in LATENT_KEYS}}
    types = getattr(theirs, "layer_types", None) or ["full_attention"] * theirs.num_hidden_layers
    if theirs.model_type == "mistral":
        types = ["sliding_attention"] * theirs.num_hidden_layers
    if "sliding_attention" in types:
        found["sliding_window"] = theirs.sliding_window
        found["full_attention_layers"] = [layer for layer, kind in enumerate(types) if kind == "full_attention"]
    unrotated = [layer for layer, rotated in enumerate(getattr(theirs, "no_rope_layers", [])) if not rotated]
    head_dim = getattr(theirs, "head_dim", None)
    norm = {"qk_norm": "rms"} if theirs.model_type == "qwen3" else {}
    return {**found, "head_dim": head_dim, "layers_without_positions": unrotated, **norm}


@pytest.mark.parametrize(("family", "name", "changes"), ROWS, ids=lambda value: str(value))
def test_logits_are_those_of_transformers(family: str, name: str, changes: dict[str, Any]):
    """Without the map's factor, or with it on other channels, they differ by more than 1e-2."""
    case = next(case for case in ALL if (case.family, case.name) == (family, name))
    theirs = stock_model(case, **changes)
    position = PositionConfig(**position_of(theirs.config))
    decoder = Decoder(ModelConfig(**model_of(theirs.config)), position, 128, serial_kit(torch.float32))
    missing, unexpected = decoder.load_state_dict(theirs.state_dict(), strict=False)
    assert not missing and set(unexpected) <= {"lm_head.weight"}
    tokens = torch.randint(0, 96, (2, 100), generator=torch.Generator().manual_seed(1))
    want = stock_logits(theirs, tokens)
    with torch.no_grad():
        got = decoder(tokens)
        decoder.position = PositionConfig(rope_theta=position.rope_theta)
        plain = decoder(tokens)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4 * want.abs().max().item())
    assert position.kind == "rope" or (plain - want).abs().max() > 1e-2 * want.abs().max()
