"""Published models: their config.json, read by tiglon and by transformers, gives the published number of parameters."""

import json
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from launch.load_config import build_config
from model.huggingface.families import imported_config
from model.sizes import parameter_counts
from tests.families.quick import some_slow

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1,
    "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008,
    "max_position_embeddings": 4096, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-5, "rope_scaling": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.40.0", "use_cache": True,
    "vocab_size": 32000,
}  # fmt: skip
LLAMA_3 = {
    **LLAMA, "bos_token_id": 128000, "eos_token_id": 128001, "intermediate_size": 14336, "max_position_embeddings": 8192,
    "num_key_value_heads": 8, "rope_theta": 500000.0, "vocab_size": 128256,
}  # fmt: skip
QWEN_2: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643,
    "hidden_act": "silu", "initializer_range": 0.02, "model_type": "qwen2", "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    "torch_dtype": "bfloat16", "transformers_version": "4.40.1", "use_cache": True, "use_mrope": False,
    "use_sliding_window": False,
}  # fmt: skip
QWEN_3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "initializer_range": 0.02,
    "max_position_embeddings": 40960, "model_type": "qwen3", "num_key_value_heads": 8, "rms_norm_eps": 1e-6,
    "rope_scaling": None, "rope_theta": 1e6, "sliding_window": None, "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
OLMO_2: dict[str, Any] = {
    **LLAMA, "architectures": ["Olmo2ForCausalLM"], "bos_token_id": None, "eos_token_id": 100257, "model_type": "olmo2",
    "pad_token_id": 100277, "rms_norm_eps": 1e-6, "rope_theta": 500000, "vocab_size": 100352,
}  # fmt: skip
OLMO_2.pop("pretraining_tp")
GEMMA_3: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "attn_logit_softcapping": None, "bos_token_id": 2, "eos_token_id": 1, "final_logit_softcapping": None, "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "initializer_range": 0.02, "max_position_embeddings": 32768,
    "model_type": "gemma3_text", "num_attention_heads": 4, "num_key_value_heads": 1, "pad_token_id": 0,
    "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6, "rope_local_base_freq": 10000, "rope_scaling": None,
    "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6, "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0", "use_cache": True, "vocab_size": 262144,
}  # fmt: skip

DEEPSEEK: dict[str, Any] = {
    "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02, "kv_lora_rank": 512,
    "max_position_embeddings": 163840, "moe_layer_freq": 1, "pretraining_tp": 1, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "rms_norm_eps": 1e-6, "rope_theta": 10000, "seq_aux": True, "tie_word_embeddings": False,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
    "torch_dtype": "bfloat16", "transformers_version": "4.33.1", "use_cache": True, "v_head_dim": 128,
}  # fmt: skip

PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "meta-llama/Llama-2-7b-hf": (LLAMA, 6_738_415_616),
    "meta-llama/Meta-Llama-3-8B": (LLAMA_3, 8_030_261_248),
    "meta-llama/Llama-3.2-1B": (
        {
            **LLAMA_3, "head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192, "max_position_embeddings": 131072,
            "mlp_bias": False, "num_hidden_layers": 16, "tie_word_embeddings": True,
            "rope_scaling": {
                "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
        },
        1_235_814_400,
    ),
    "mistralai/Mistral-7B-v0.1": (
        {
            "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
            "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
            "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
            "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0", "use_cache": True, "vocab_size": 32000,
        },
        7_241_732_096,
    ),
    "Qwen/Qwen2.5-7B": (
        {
            **QWEN_2, "hidden_size": 3584, "intermediate_size": 18944, "max_position_embeddings": 131072,
            "max_window_layers": 28, "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
            "sliding_window": 131072, "tie_word_embeddings": False, "vocab_size": 152064,
        },
        7_615_616_512,
    ),
    "Qwen/Qwen2.5-0.5B": (
        {
            **QWEN_2, "hidden_size": 896, "intermediate_size": 4864, "max_position_embeddings": 32768,
            "max_window_layers": 24, "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
            "sliding_window": 32768, "tie_word_embeddings": True, "vocab_size": 151936,
        },
        494_032_768,
    ),
    "Qwen/Qwen3-8B": (
        {
            **QWEN_3, "hidden_size": 4096, "intermediate_size": 12288, "max_window_layers": 36, "num_attention_heads": 32,
            "num_hidden_layers": 36, "tie_word_embeddings": False,
        },
        8_190_735_360,
    ),
    "Qwen/Qwen3-0.6B": (
        {
            **QWEN_3, "hidden_size": 1024, "intermediate_size": 3072, "max_window_layers": 28, "num_attention_heads": 16,
            "num_hidden_layers": 28, "tie_word_embeddings": True,
        },
        596_049_920,
    ),
    "HuggingFaceTB/SmolLM3-3B": (
        {
            "architectures": ["SmolLM3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": None,
            "eos_token_id": 128012, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
            "intermediate_size": 11008, "layer_types": ["full_attention"] * 36, "max_position_embeddings": 65536,
            "max_window_layers": 28, "mlp_bias": False, "model_type": "smollm3", "no_rope_layer_interval": 4,
            "no_rope_layers": [1, 1, 1, 0] * 9, "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 4,
            "pad_token_id": 128004, "pretraining_tp": 2, "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 5000000.0,
            "sliding_window": None, "torch_dtype": "bfloat16", "transformers_version": "4.54.0.dev0", "use_cache": False,
            "use_sliding_window": False, "vocab_size": 128256,
        },
        3_075_098_624,
    ),
    "allenai/OLMo-2-1124-7B": (OLMO_2, 7_298_617_344),
    "allenai/Olmo-3-1025-7B": (
        {
            **OLMO_2, "architectures": ["Olmo3ForCausalLM"], "max_position_embeddings": 65536, "model_type": "olmo3",
            "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 8, "sliding_window": 4096, "vocab_size": 100278,
            "rope_scaling": {
                "attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0, "factor": 8.0,
                "original_max_position_embeddings": 8192, "rope_type": "yarn",
            },
        },
        7_298_011_136,
    ),
    "google/gemma-3-1b-pt": (
        {**GEMMA_3, "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26}, 999_885_952,
    ),
    "google/gemma-3-270m": (
        {**GEMMA_3, "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18}, 268_098_176,
    ),
    "microsoft/Phi-3-mini-4k-instruct": (
        {
            "architectures": ["Phi3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1,
            "embd_pdrop": 0.0, "eos_token_id": 32000, "hidden_act": "silu", "hidden_size": 3072, "initializer_range": 0.02,
            "intermediate_size": 8192, "max_position_embeddings": 4096, "model_type": "phi3", "num_attention_heads": 32,
            "num_hidden_layers": 32, "num_key_value_heads": 32, "original_max_position_embeddings": 4096,
            "pad_token_id": 32000, "resid_pdrop": 0.0, "rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 10000.0,
            "sliding_window": 2047, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
            "transformers_version": "4.40.2", "vocab_size": 32064,
        },
        3_821_079_552,
    ),
    "deepseek-ai/deepseek-llm-7b-base": (
        {**LLAMA, "bos_token_id": 100000, "eos_token_id": 100001, "num_hidden_layers": 30, "rms_norm_eps": 1e-6,
         "vocab_size": 102400},
        6_910_365_696,
    ),
    "deepseek-ai/DeepSeek-V2-Lite": (
        {
            **DEEPSEEK, "architectures": ["DeepseekV2ForCausalLM"], "aux_loss_alpha": 0.001, "bos_token_id": 100000,
            "eos_token_id": 100001, "first_k_dense_replace": 1, "hidden_size": 2048, "intermediate_size": 10944,
            "model_type": "deepseek_v2", "moe_intermediate_size": 1408, "n_group": 1, "n_routed_experts": 64,
            "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 16, "num_experts_per_tok": 6,
            "num_hidden_layers": 27, "num_key_value_heads": 16, "q_lora_rank": None, "routed_scaling_factor": 1.0,
            "scoring_func": "softmax", "topk_group": 1, "topk_method": "greedy", "vocab_size": 102400,
        },
        15_706_484_224,
    ),
    "deepseek-ai/DeepSeek-V3": (
        {
            **DEEPSEEK, "architectures": ["DeepseekV3ForCausalLM"], "bos_token_id": 0, "ep_size": 1, "eos_token_id": 1,
            "first_k_dense_replace": 3, "hidden_size": 7168, "intermediate_size": 18432, "model_type": "deepseek_v3",
            "moe_intermediate_size": 2048, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1,
            "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
            "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "routed_scaling_factor": 2.5,
            "scoring_func": "sigmoid", "topk_group": 4, "topk_method": "noaux_tc", "vocab_size": 129280,
        },
        671_026_404_352,
    ),
    "Qwen/Qwen3-30B-A3B": (
        {
            **QWEN_3, "architectures": ["Qwen3MoeForCausalLM"], "decoder_sparse_step": 1, "hidden_size": 2048,
            "intermediate_size": 6144, "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe",
            "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128,
            "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": False,
            "router_aux_loss_coef": 0.001, "tie_word_embeddings": False,
        },
        30_532_122_624,
    ),
    "mistralai/Mixtral-8x7B-v0.1": (
        {
            "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
            "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
            "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32, "num_experts_per_tok": 2,
            "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": False,
            "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None,
            "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.36.0.dev0",
            "use_cache": True, "vocab_size": 32000,
        },
        46_702_792_704,
    ),
    "allenai/OLMoE-1B-7B-0924": (
        {
            "architectures": ["OlmoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "clip_qkv": None,
            "eos_token_id": 50279, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
            "intermediate_size": 1024, "max_position_embeddings": 4096, "model_type": "olmoe", "norm_topk_prob": False,
            "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 16,
            "num_key_value_heads": 16, "output_router_logits": False, "pad_token_id": 1, "rms_norm_eps": 1e-5,
            "rope_scaling": None, "rope_theta": 10000.0, "router_aux_loss_coef": 0.01, "tie_word_embeddings": False,
            "torch_dtype": "bfloat16", "transformers_version": "4.43.0.dev0", "use_cache": True, "vocab_size": 50304,
        },
        6_919_161_856,
    ),
}  # fmt: skip
"""Address on Hugging Face's hub -> config.json and number of parameters. DeepSeek-V3's file has a quantization_config too: it
is imported once its weights are in bfloat16."""

LATENT: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "first_k_dense_replace": 61,
        "hidden_size": 7168, "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 4096,
        "model_type": "deepseek_v3", "num_attention_heads": 128, "num_hidden_layers": 61, "num_key_value_heads": 128,
        "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False, "v_head_dim": 128, "vocab_size": 129280,
    },
    "deepseek_v2": {
        "architectures": ["DeepseekV2ForCausalLM"], "attention_bias": False, "first_k_dense_replace": 27,
        "hidden_size": 2048, "intermediate_size": 10944, "kv_lora_rank": 512, "max_position_embeddings": 4096,
        "model_type": "deepseek_v2", "num_attention_heads": 16, "num_hidden_layers": 27, "num_key_value_heads": 16,
        "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False, "v_head_dim": 128, "vocab_size": 102400,
    },
}  # fmt: skip
"""DeepSeek-V3 and DeepSeek-V2-Lite with every layer dense: no such model is published, only transformers says its number."""


QUICK = ("Qwen/Qwen3-8B", "mistralai/Mistral-7B-v0.1", "allenai/OLMoE-1B-7B-0924", "deepseek-ai/DeepSeek-V3")


def our_count(config: dict[str, Any]) -> int:
    model, position, length = imported_config(json.loads(json.dumps(config)), "config.json")
    read = build_config({"model": model, "position": position, "train": {"sequence_length": length}})
    return parameter_counts(read.model)["total"]


def stock_count(config: dict[str, Any]) -> int:
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(AutoConfig.for_model(**json.loads(json.dumps(config))))
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("name", some_slow(PUBLISHED, QUICK))
def test_a_published_model_has_its_published_number_of_parameters(name: str):
    config, count = PUBLISHED[name]
    assert (our_count(config), stock_count(config)) == (count, count)


@pytest.mark.slow
@pytest.mark.parametrize("family", LATENT)
def test_a_dense_network_of_latent_attention_has_as_many_as_in_transformers(family: str):
    assert our_count(LATENT[family]) == stock_count(LATENT[family])
