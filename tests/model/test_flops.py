"""Parameters and operations against hand counts, published sizes and torch's own counter."""

import pytest

from model.config import ModelConfig
from model.flops import attention_flops_per_token, flops_per_token, parameters, tensors

LLAMA_8B = ModelConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, tie_word_embeddings=False,
)  # fmt: skip
DEEPSEEK_V2 = ModelConfig(
    vocab_size=102400, hidden_size=5120, intermediate_size=12288, num_hidden_layers=60, num_attention_heads=128,
    attention="mla", q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
)  # fmt: skip


def test_llama_8b_by_hand():
    assert parameters(LLAMA_8B) == {
        "embedding": 525_336_576,
        "attention": 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024),
        "mlp": 32 * 3 * 4096 * 14336,
        "norms": 65 * 4096,
        "head": 525_336_576,
        "total": 8_030_261_248,  # as published
    }


def test_flops_of_llama_8b_by_hand():
    multiplied = 8_030_261_248 - 525_336_576 - 65 * 4096
    assert flops_per_token(LLAMA_8B, 4096, causal=False) == 6 * multiplied + 12 * 32 * 4096 * 4096
    assert flops_per_token(LLAMA_8B, 4096, causal=True) == 6 * multiplied + 6 * 32 * 4096 * 4097


def test_published_mfu_of_an_8b_model():
    """10,471 tokens a second on a peak of 989 TFLOP/s, without the input embedding: 54.5 % full, 51.1 % causal."""
    full, causal = (10_471 * flops_per_token(LLAMA_8B, 4096, causal=how) / 989e12 for how in (False, True))
    assert full == pytest.approx(0.545, abs=5e-4)
    assert causal == pytest.approx(0.511, abs=5e-4)


@pytest.mark.parametrize(
    ("width", "heads", "q_lora_rank", "millions"), [(5120, 128, 1536, 149.2), (7168, 128, 1536, 187.1), (2048, 16, None, 13.8)]
)
def test_attention_parameters_of_deepseek(width, heads, q_lora_rank, millions):
    """V2, V3 and V2-Lite: parameters of one MLA layer as published."""
    config = DEEPSEEK_V2.model_copy(
        update={"hidden_size": width, "num_attention_heads": heads, "q_lora_rank": q_lora_rank, "num_hidden_layers": 1}
    )
    assert parameters(config)["attention"] / 1e6 == pytest.approx(millions, abs=0.05)


def test_tied_head_multiplies_but_has_no_parameters():
    tied = ModelConfig(tie_word_embeddings=True, tied_head="half-swap")
    untied = ModelConfig(tie_word_embeddings=False)
    assert parameters(tied)["head"] == 0
    assert flops_per_token(tied, 64, causal=True) == flops_per_token(untied, 64, causal=True)


def test_windowed_scores_are_counted_one_by_one():
    config = ModelConfig(num_hidden_layers=3, sliding_window=5, full_attention_layers=[-1])
    length = 16
    windowed = sum(1 for i in range(length) for j in range(i + 1) if i - j < 5)
    full = length * (length + 1) / 2
    per_score = 2 * config.num_attention_heads * 2 * config.head_size
    assert attention_flops_per_token(config, length, causal=True) == pytest.approx(per_score * (2 * windowed + full) / length)


def test_every_rank_holds_its_share():
    split = [tensor for tensor in tensors(DEEPSEEK_V2) if tensor.split is not None]
    whole = [tensor for tensor in tensors(DEEPSEEK_V2) if tensor.split is None]
    assert {tensor.name.split(".")[-2] for tensor in whole} == {
        "q_a_proj", "q_a_layernorm", "kv_a_proj_with_mqa", "kv_a_layernorm",
        "input_layernorm", "post_attention_layernorm", "norm",
    }  # fmt: skip
    assert all(tensor.numbers_per_rank(8) * 8 == tensor.numbers for tensor in split)
    assert all(tensor.numbers_per_rank(8) == tensor.numbers for tensor in whole)
