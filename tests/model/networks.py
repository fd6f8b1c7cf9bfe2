"""Sizes of networks that several tests count: two as published, and small ones of every kind."""

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
