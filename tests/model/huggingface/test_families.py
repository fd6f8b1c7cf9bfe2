"""Which family a network goes out as, and what is refused."""

import re
from typing import Any

import pytest

from model.config import ATTENTION, FEED_FORWARD, ModelConfig
from model.huggingface.families import FAMILIES, exported_config, family_of, imported_config
from model.positions.config import PositionConfig
from tests.model.huggingface.check import stock_config

SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
MLA = {"attention": "mla", "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
SOFTMAX = {"feed_forward": "moe", "scoring_func": "softmax", "router_bias": False, "n_shared_experts": 0}
WINDOWS = {"sliding_window": 8, "full_attention_layers": [1, 3]}
EXPORTED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {}, "llama"),
    ({"num_key_value_heads": 2, "attention_bias": "all", "mlp_bias": True}, {"kind": "pi", "factor": 2.0}, "llama"),
    ({"num_attention_heads": 3, "head_dim": 10}, {}, "mistral"),  # transformers' Llama wants whole heads
    ({"sliding_window": 8}, {"kind": "yarn", "factor": 4.0, "yarn_ramp": "index"}, "mistral"),
    ({"feed_forward": "geglu"}, {}, "llama"),
    ({"attention_bias": "qkv"}, {}, "qwen2"),
    (WINDOWS | {"attention_bias": "qkv"}, {}, "qwen2"),
    ({"qk_norm": "rms", "head_dim": 16}, {}, "qwen3"),
    (WINDOWS | {"qk_norm": "rms"}, {"kind": "ntk", "factor": 2.0}, "qwen3"),
    (WINDOWS, {}, "smollm3"),
    (WINDOWS | {"full_attention_position": "none"}, {}, "smollm3"),
    ({"layers_without_positions": [-1]}, {}, "smollm3"),
    ({"norm_placement": "post", "qk_norm": "rms-all-heads"}, {}, "olmo2"),
    (WINDOWS | {"norm_placement": "post", "qk_norm": "rms-all-heads"}, {"windowed_rope_theta": 100.0}, "olmo3"),
    (
        WINDOWS | {"norm_placement": "sandwich", "qk_norm": "rms", "zero_centered_gains": True, "scale_embedding": True,
                   "feed_forward": "geglu"},
        {"windowed_rope_theta": 100.0, "kind": "pi", "factor": 8.0}, "gemma3_text",
    ),
    (MLA | {"rms_norm_eps": 1e-6}, {"kind": "yarn", "factor": 4.0, "yarn_ramp": "index"}, "deepseek_v3"),
    (MLA | {"rms_norm_eps": 1e-6, "mlp_bias": True}, {}, "deepseek_v2"),
    (SOFTMAX | {"router_aux_loss_coef": 0.01}, {}, "mixtral"),
    (SOFTMAX | {"qk_norm": "rms", "first_k_dense_replace": 2, "norm_topk_prob": False, "sliding_window": 8}, {}, "qwen3_moe"),
    (SOFTMAX | {"qk_norm": "rms-all-heads", "router_z_loss_coef": 0.1}, {}, "olmoe"),
    (MLA | {"rms_norm_eps": 1e-6, "feed_forward": "moe", "n_group": 2, "router_bias_rate": 0.01}, {}, "deepseek_v3"),
    (
        MLA | SOFTMAX | {"rms_norm_eps": 1e-6, "n_shared_experts": 2, "norm_topk_prob": False, "routed_scaling_factor": 2.0,
                         "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1},
        {}, "deepseek_v2",
    ),
]  # fmt: skip


@pytest.mark.parametrize("model, position, family", EXPORTED)
def test_a_network_goes_out_as_the_first_family_that_computes_it(model: dict, position: dict, family: str):
    network = ModelConfig.model_validate({**SIZES, "tied_head": "plain", **model})
    out = exported_config(network, PositionConfig.model_validate(position), 64, lossy=False)
    assert out.family is FAMILIES[family] and not out.lost


def test_a_family_may_be_named():
    network = ModelConfig.model_validate({**SIZES, "tied_head": "plain"})
    assert exported_config(network, PositionConfig(), 64, lossy=False, family="phi3").family is FAMILIES["phi3"]
    assert exported_config(network, PositionConfig(), 64, lossy=False, first="phi3").family is FAMILIES["phi3"]
    assert exported_config(network, PositionConfig(), 64, lossy=False, first="qwen3").family is FAMILIES["llama"]
    for family, sentence in (
        ("bert", "--family bert: legal are llama, mistral"),
        ("qwen3", "this stock architecture computes another network: Qwen3ForCausalLM has qk_norm = 'rms', the network 'none'"),
        ("deepseek_v3", "--family deepseek_v3 has other kinds of layers"),
    ):
        with pytest.raises(ValueError, match=sentence):
            exported_config(network, PositionConfig(), 64, lossy=False, family=family)


@pytest.mark.parametrize(
    "model, position, sentence",
    [
        (
            {"qk_norm": "key-l2"},
            {},
            "no stock architecture computes this network; the nearest: LlamaForCausalLM has qk_norm = 'none'",
        ),
        ({}, {"kind": "ntk-mixed", "factor": 2}, "position.kind = 'ntk-mixed' has no stock architecture"),
        (SOFTMAX | {"router_bias": True}, {}, "the nearest: MixtralForCausalLM has router_bias = False, the network True"),
        (SOFTMAX | {"norm_topk_prob": False}, {}, "MixtralForCausalLM has norm_topk_prob = True, the network False"),
        (SOFTMAX | {"first_k_dense_replace": 1}, {}, "the nearest: Qwen3MoeForCausalLM has qk_norm = 'rms'"),
        ({"feed_forward": "moe"}, {}, "no stock architecture computes this network"),
        ({"query_pre_attn_scalar": 3.0}, {}, "no stock architecture computes this network"),
        (WINDOWS | {"qk_norm": "rms"}, {"windowed_rope_theta": 100.0}, "rotates windowed layers beside the others"),
        ({}, {"kind": "rerope", "window": 8}, "would lose something: .* from 8 tokens on differ; export with --lossy"),
        (MLA, {}, "transformers adds 1e-06 in the norms of the latents, the model was trained with 1e-05"),
    ],
)  # fmt: skip
def test_what_no_stock_architecture_computes_is_refused(model: dict, position: dict, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        exported_config(ModelConfig(**SIZES, **model), PositionConfig(**position), 64, lossy=False)


@pytest.mark.parametrize("key", ["attention", "feed_forward"])
def test_a_kind_without_a_stock_architecture_is_refused(key: str, monkeypatch: pytest.MonkeyPatch):
    """A kind that was added without its family: here another name for one that is there."""
    table = ATTENTION if key == "attention" else FEED_FORWARD
    monkeypatch.setitem(table, "new", next(iter(table.values())))  # type: ignore[arg-type]
    model = ModelConfig(**SIZES).model_copy(update={key: "new"})
    with pytest.raises(ValueError, match=f"{key} = 'new' has no stock architecture here; those that have: "):
        exported_config(model, PositionConfig(), 64, lossy=False)


def test_a_lossy_export_says_what_is_lost():
    model = ModelConfig.model_validate({**SIZES, "tied_head": "plain"})
    lost = exported_config(model, PositionConfig(kind="rerope", window=8, log_n="trained"), 64, lossy=True).lost
    assert len(lost) == 2 and "becomes plain RoPE" in lost[0] and "log n" in lost[1]


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"model_type": "bert"}, "config.json has model_type = 'bert'; those that can be imported: llama, mistral"),
        ({"model_type": None}, "config.json has model_type = None; those"),
        ({"model_type": ["llama"]}, "config.json has model_type = ['llama']; those"),
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            "has architectures = ['LlamaForSequenceClassification']; of model_type = 'llama' only LlamaForCausalLM can",
        ),
        ({"architectures": "LlamaForCausalLM"}, "has architectures = 'LlamaForCausalLM'; of"),
        ({"logit_scale": 0.5}, "config.json: logit_scale = 0.5 is not known to tiglon"),
        ({"quantization_config": {}}, "config.json: quantization_config = {} is not known to tiglon"),
    ],
)
def test_what_tiglon_does_not_compute_is_refused(change: dict, sentence: str):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        imported_config(stock_config("llama") | change, "config.json")


def test_a_family_is_known_by_its_model_type_alone():
    assert family_of({"model_type": "qwen3"}, "config.json") is FAMILIES["qwen3"]


def test_the_user_may_vouch_for_a_key():
    own = {"made_by": "us", "rope_parameters": {"rope_type": "default", "rope_theta": 5e3, "note": 1}}
    assert imported_config(stock_config("llama") | own, "config.json", ignore=["made_by", "rope_parameters.note"])
    for key in ("nothing", "hidden_act"):
        with pytest.raises(ValueError, match=f"--ignore {key}: config.json has no such key, or tiglon reads it"):
            imported_config(stock_config("llama"), "config.json", ignore=[key])
