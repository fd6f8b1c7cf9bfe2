"""Configurations that contradict themselves are refused in one sentence; sizes derived from others."""

import pytest
from pydantic import ValidationError

from model.config import ATTENTION, FEED_FORWARD, ModelConfig
from model.sublayer import Sublayer

MLA = {"attention": "mla", "kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"attention": "mla"}, "attention = 'mla' needs kv_lora_rank"),
        ({"head_dim": 7}, "head_dim = 7 must be even"),
        ({"num_attention_heads": 3, "hidden_size": 64}, "hidden_size = 64 is not divisible by num_attention_heads = 3"),
        ({"num_key_value_heads": 3}, "num_attention_heads = 4 must be a multiple of num_key_value_heads = 3"),
        ({"hidden_size": 33, "head_dim": 8}, "tied_head = 'half-swap' needs an even hidden_size"),
        ({"full_attention_layers": [0]}, "full_attention_layers needs sliding_window"),
        ({"sliding_window": 4, "full_attention_layers": [6]}, "the layers run from 0 to 5"),
        (MLA | {"qk_norm": "key-l2"}, "cannot be used with attention = 'mla'"),
        (MLA | {"qk_rope_head_dim": 3}, "qk_rope_head_dim = 3 must be even"),
    ],
)
def test_bad_models_are_refused_in_one_sentence(settings, sentence):
    with pytest.raises(ValidationError, match=sentence):
        ModelConfig(**settings)


def test_sizes_of_heads():
    grouped = ModelConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    assert (grouped.kv_heads, grouped.head_size, grouped.rotary_size, grouped.value_size) == (2, 16, 16, 16)
    latent = ModelConfig.model_validate(MLA)
    assert (latent.kv_heads, latent.head_size, latent.rotary_size, latent.value_size) == (4, 10, 4, 5)


def test_a_kind_that_is_in_no_table_is_answered_with_the_table():
    for key, legal in (("attention", "'gqa' or 'mla'"), ("feed_forward", "'swiglu', 'geglu' or 'moe'")):
        with pytest.raises(ValidationError, match=f"Input should be {legal}"):
            ModelConfig.model_validate({key: "linear"})
    with pytest.raises(ValueError, match=r"model\.attention = 'linear' is unknown; legal: gqa, mla"):
        _ = ModelConfig().model_copy(update={"attention": "linear"}).kinds


@pytest.mark.parametrize("kind", [*ATTENTION.values(), *FEED_FORWARD.values()])
def test_the_keys_of_every_kind_are_keys_of_the_model(kind: type[Sublayer]):
    assert issubclass(ModelConfig, kind.section)


def test_keys_that_act():
    grouped = ModelConfig(hidden_size=64, num_attention_heads=4).effective()
    assert (grouped["num_key_value_heads"], grouped["head_dim"], grouped["tied_head"]) == (4, 16, "half-swap")
    assert "kv_lora_rank" not in grouped and "num_key_value_heads" not in ModelConfig.model_validate(MLA).effective()
    assert ModelConfig(tie_word_embeddings=False).effective()["tied_head"] is None


def test_keys_of_another_network():
    free = {"rms_norm_eps", "initializer_range", "residual_init", "sliding_window", "query_pre_attn_scalar", "latent_norm_eps"}
    free |= {"full_attention_layers", "full_attention_position", "layers_without_positions", "pad_vocab_to_multiple"}
    free |= {"router_bias_rate", "router_bias_step", "router_aux_loss_coef", "router_z_loss_coef"}
    assert set(ModelConfig.structure()) == set(ModelConfig.model_fields) - free
