"""Sizes of networks that several tests count: two as published, and small ones of every kind."""

from typing import Any

from model.config import ModelConfig

LLAMA_8B = ModelConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, tie_word_embeddings=False,
)  # fmt: skip
DEEPSEEK_V2 = ModelConfig(
    vocab_size=102400, hidden_size=5120, intermediate_size=12288, num_hidden_layers=60, num_attention_heads=128,
    attention="mla", q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
)  # fmt: skip

SMALL = dict(vocab_size=96, hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4)
MLA = dict(attention="mla", kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6)
NETWORKS = {
    "gqa": ModelConfig(**SMALL, num_key_value_heads=2),
    "mha, untied, qk norm": ModelConfig(**SMALL, tie_word_embeddings=False, qk_norm="rms"),
    "projected head": ModelConfig(**SMALL, tied_head="projection"),
    "mla": ModelConfig(**SMALL, **MLA, q_lora_rank=12),
    "norms of outputs, all heads normed, biases": ModelConfig(
        **SMALL, num_key_value_heads=2, norm_placement="post", qk_norm="rms-all-heads", attention_bias="all", mlp_bias=True
    ),
    "norms on both sides, zero-centred, geglu": ModelConfig(
        **SMALL, norm_placement="sandwich", qk_norm="rms", zero_centered_gains=True, feed_forward="geglu",
        scale_embedding=True,
    ),
    "mla, full-rank queries": ModelConfig(**SMALL, **MLA),
}  # fmt: skip

LATENT = dict(attention="mla", kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
SOFTMAX = dict(scoring_func="softmax", router_bias=False)
PUBLISHED: dict[str, tuple[dict[str, Any], int, float, bool]] = {
    "DeepSeek-V2-Lite": (
        LATENT | SOFTMAX | dict(
            vocab_size=102400, hidden_size=2048, intermediate_size=10944, num_hidden_layers=27, num_attention_heads=16,
            n_routed_experts=64, num_experts_per_tok=6, n_shared_experts=2, moe_intermediate_size=1408,
            first_k_dense_replace=1, norm_topk_prob=False,
        ),
        15_706_484_224, 2.4, True,
    ),
    "DeepSeek-V2": (
        LATENT | SOFTMAX | dict(
            vocab_size=102400, hidden_size=5120, intermediate_size=12288, num_hidden_layers=60, num_attention_heads=128,
            q_lora_rank=1536, n_routed_experts=160, num_experts_per_tok=6, n_shared_experts=2, moe_intermediate_size=1536,
            first_k_dense_replace=1, norm_topk_prob=False, n_group=8, topk_group=3, routed_scaling_factor=16.0,
        ),
        235_741_434_880, 21, True,
    ),
    "DeepSeek-V3": (
        LATENT | dict(
            vocab_size=129280, hidden_size=7168, intermediate_size=18432, num_hidden_layers=61, num_attention_heads=128,
            q_lora_rank=1536, n_routed_experts=256, num_experts_per_tok=8, n_shared_experts=1, moe_intermediate_size=2048,
            first_k_dense_replace=3, n_group=8, topk_group=4, routed_scaling_factor=2.5,
        ),
        671_026_404_352, 37, True,
    ),
    "Qwen3-30B-A3B": (
        SOFTMAX | dict(
            vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=48, num_attention_heads=32,
            num_key_value_heads=4, head_dim=128, qk_norm="rms", n_routed_experts=128, num_experts_per_tok=8,
            n_shared_experts=0, moe_intermediate_size=768,
        ),
        30_532_122_624, 3.3, False,
    ),
    "Mixtral-8x7B": (
        SOFTMAX | dict(
            vocab_size=32000, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
            n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=0, moe_intermediate_size=14336,
        ),
        46_702_792_704, 12.9, False,
    ),
    "OLMoE-1B-7B": (
        SOFTMAX | dict(
            vocab_size=50304, hidden_size=2048, num_hidden_layers=16, num_attention_heads=16, qk_norm="rms-all-heads",
            n_routed_experts=64, num_experts_per_tok=8, n_shared_experts=0, moe_intermediate_size=1024, norm_topk_prob=False,
        ),
        6_919_161_856, 1.3, False,
    ),
}  # fmt: skip
"""Networks with experts: keys, parameters, billions of them that are published as active, and whether these are without the
embedding."""
