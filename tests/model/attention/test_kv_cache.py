"""Decoding with a cache gives what one pass over everything gives, for every map and kind; and what it holds."""

from itertools import product

import pytest
import torch

from model.attention.kv_cache import KVCache
from model.config import ModelConfig
from model.decoder import Decoder
from model.initialization import initialise
from model.parallel.layers import serial_kit
from model.positions.config import PositionConfig
from tests.model.oracle import MAPS, TRAINED

MLA = {"attention": "mla", "kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
KINDS = {
    "gqa": {"num_key_value_heads": 2},
    "mla": MLA,
    "all heads normed": {
        "num_key_value_heads": 2,
        "qk_norm": "rms-all-heads",
        "norm_placement": "post",
        "attention_bias": "all",
    },
    "zero-centred": {
        "norm_placement": "sandwich",
        "zero_centered_gains": True,
        "qk_norm": "rms",
        "scale_embedding": True,
        "query_pre_attn_scalar": 3.0,
        "feed_forward": "geglu",
        "mlp_bias": True,
    },
    "zero-centred mla": {**MLA, "zero_centered_gains": True},
    "hwfa": {"sliding_window": 5, "full_attention_layers": [-1], "full_attention_position": "none"},
    "hwfa2": {"sliding_window": 5, "full_attention_layers": [1]},
}
OWN_BASE = {
    "yarn-own-base": MAPS["yarn-factors"].model_copy(update={"windowed_rope_theta": 20.0}),
    "rerope-own-base": MAPS["rerope-logn"].model_copy(update={"windowed_rope_theta": 20.0}),
}
UNROTATED = {
    "gqa, unrotated": {"layers_without_positions": [0]},
    "windowed, unrotated": {"sliding_window": 5, "layers_without_positions": [-1]},
    "mla, unrotated": {**MLA, "layers_without_positions": [0]},
}
LENGTH = 40


def make(position, **kind):
    """Two layers of width 16 in float64, with weights large enough to matter."""
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = ModelConfig(**(sizes | {"head_dim": 8, "initializer_range": 0.3} | kind))
    decoder = Decoder(config, position, TRAINED, serial_kit(torch.float64))
    initialise(decoder, 0)
    for parameter in decoder.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return decoder


def cache_for(decoder, batch=2, starts=None):
    return KVCache(decoder.config, decoder.position, TRAINED, batch, LENGTH, starts)


@torch.no_grad()
def decode(decoder, tokens, chunks, starts=None):
    cache = cache_for(decoder, tokens.shape[0], starts)
    return torch.cat([decoder(part, cache=cache) for part in tokens.split(chunks, dim=1)], dim=1)


@pytest.mark.parametrize(
    "position, kind",
    [
        *product(MAPS, KINDS),
        *product(OWN_BASE, ["hwfa", "hwfa2"]),
        *product(["yarn-factors", "rerope-logn", "leaky"], UNROTATED),
    ],
)
def test_decoding_equals_one_pass(position, kind):
    """Token by token from a short prompt, in chunks across the window, and prompts as long as the window and one more."""
    decoder = make((MAPS | OWN_BASE)[position], **(KINDS | UNROTATED)[kind])
    tokens = torch.randint(0, 50, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = decoder(tokens)
    for chunks in ([4, *[1] * 36], [7, *[1] * 3, 30], [8, 5, 1, 6, 20]):
        torch.testing.assert_close(decode(decoder, tokens, chunks), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("position", ["rope", "rerope-logn", "leaky", "inverse"])
def test_prompts_of_unequal_length_do_not_see_each_other_or_padding(position, kind):
    decoder = make(MAPS[position], **KINDS[kind])
    tokens = torch.randint(0, 50, (3, LENGTH), generator=torch.Generator().manual_seed(2))
    starts = torch.tensor([0, 9, 14])
    together = decode(decoder, tokens, [15, *[1] * 25], starts)
    for row, start in enumerate(starts.tolist()):
        with torch.no_grad():
            alone = decoder(tokens[row : row + 1, start:])
        torch.testing.assert_close(together[row, start:], alone[0], rtol=0, atol=1e-12)


def elements(decoder):
    """Elements allocated per layer, after one row of LENGTH tokens."""
    cache = cache_for(decoder, 1)
    with torch.no_grad():
        decoder(torch.zeros(1, LENGTH, dtype=torch.int64), cache=cache)
    return [layer.elements() for layer in cache.layers]


def test_what_is_held():
    """MLA: kv_lora_rank + qk_rope_head_dim per token. ReRoPE: as plain, and the window with a quarter of slack."""
    assert elements(make(MAPS["rope"], num_key_value_heads=2)) == [2 * 2 * 8 * LENGTH] * 2
    assert elements(make(MAPS["rope"], **MLA)) == [(12 + 4) * LENGTH] * 2
    rerope = PositionConfig(kind="rerope", window=8)
    assert elements(make(rerope, num_key_value_heads=2)) == [2 * 2 * 8 * LENGTH + 2 * 8 * 10] * 2
    assert elements(make(rerope, **MLA)) == [(12 + 4) * LENGTH + 4 * 10] * 2
    windowed = make(MAPS["rope"], num_key_value_heads=2, sliding_window=8, full_attention_layers=[1])
    assert elements(windowed) == [2 * 2 * 8 * 10, 2 * 2 * 8 * LENGTH]


def test_a_full_cache_says_so():
    decoder = make(MAPS["rope"])
    with pytest.raises(ValueError, match="0 cached tokens and 41 more exceed the cache's capacity of 40"):
        decoder(torch.zeros(2, 41, dtype=torch.int64), cache=cache_for(decoder))
    with pytest.raises(ValueError, match="made for 2 rows and got 3"):
        decoder(torch.zeros(3, 4, dtype=torch.int64), cache=cache_for(decoder))
