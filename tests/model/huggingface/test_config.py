"""config.json out and back: what transformers makes of it, what a round trip keeps, what is refused."""

import pytest
import transformers

from model.config import ATTENTION, FEED_FORWARD, ModelConfig
from model.huggingface.config import exported_config, imported_config
from model.positions.config import PositionConfig

SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
MLA = {"attention": "mla", "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
NETWORKS = {
    "llama": {"num_key_value_heads": 2},
    "qwen3": {"qk_norm": "rms", "head_dim": 16},
    "qwen3, windowed": {"qk_norm": "rms", "sliding_window": 8, "full_attention_layers": [1, 3]},
    "mistral": {"sliding_window": 8},
    "deepseek_v3": {**MLA, "q_lora_rank": 12, "rms_norm_eps": 1e-6},
}
MAPS = {
    "rope": {"rope_theta": 5e5},
    "pi": {"kind": "pi", "factor": 4.0},
    "yarn": {"kind": "yarn", "factor": 4.0, "yarn_ramp": "index", "trained_length": 64},
}


def network(name: str) -> ModelConfig:
    return ModelConfig.model_validate(SIZES | {"tied_head": "plain"} | NETWORKS[name])


@pytest.mark.parametrize("name", NETWORKS)
def test_a_round_trip_keeps_the_network(name: str):
    model = network(name)
    config, lost = exported_config(model, PositionConfig(), 64, 0, "float32", lossy=False)
    again, position, length = imported_config(config, "config.json")
    imported = ModelConfig.model_validate(again)
    assert not lost and length == 64 and PositionConfig(**position) == PositionConfig()
    derived = ("kv_heads", "head_size", "rotary_size", "value_size")
    assert [getattr(imported, name) for name in derived] == [getattr(model, name) for name in derived]
    filled = {"num_key_value_heads": imported.num_key_value_heads, "head_dim": imported.head_dim}
    assert imported == model.model_copy(update=filled)


@pytest.mark.parametrize("name", MAPS)
def test_a_round_trip_keeps_the_map(name: str):
    position = PositionConfig.model_validate(MAPS[name])
    config, _ = exported_config(network("llama"), position, 64, None, "float32", lossy=False)
    _, again, length = imported_config(config, "config.json")
    assert length == 64 and PositionConfig.model_validate(again) == position


@pytest.mark.parametrize("name", NETWORKS)
def test_transformers_reads_it(name: str):
    config, _ = exported_config(network(name), PositionConfig(), 64, 7, "bfloat16", lossy=False)
    theirs = transformers.AutoConfig.for_model(**config)
    assert theirs.model_type == name.split(",")[0] and theirs.eos_token_id == 7
    assert (theirs.hidden_size, theirs.num_hidden_layers, theirs.max_position_embeddings) == (32, 4, 64)
    if "windowed" in name:
        assert theirs.layer_types == ["sliding_attention", "full_attention"] * 2


@pytest.mark.parametrize(
    "model, position, sentence",
    [
        ({"qk_norm": "key-l2"}, {}, "qk_norm = 'key-l2' has no stock architecture"),
        ({}, {"kind": "ntk-mixed", "factor": 2}, "position.kind = 'ntk-mixed' has no stock architecture"),
        ({"sliding_window": 8, "full_attention_layers": [0]}, {}, "sliding_window in some layers only needs qk_norm = 'rms'"),
        (
            {},
            {"kind": "rerope", "window": 8},
            "would lose something: .* from 8 tokens on differ; export with --lossy",
        ),
    ],
)
def test_what_no_stock_architecture_computes_is_refused(model: dict, position: dict, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        exported_config(ModelConfig(**SIZES, **model), PositionConfig(**position), 64, None, "float32", lossy=False)


@pytest.mark.parametrize("key", ["attention", "feed_forward"])
def test_a_kind_without_a_stock_architecture_is_refused(key: str, monkeypatch: pytest.MonkeyPatch):
    """A kind that was added without its mapping: here another name for one that is there."""
    table = ATTENTION if key == "attention" else FEED_FORWARD
    monkeypatch.setitem(table, "new", next(iter(table.values())))  # type: ignore[arg-type]
    model = ModelConfig(**SIZES).model_copy(update={key: "new"})
    with pytest.raises(ValueError, match=f"{key} = 'new' has no stock architecture here; those that have: "):
        exported_config(model, PositionConfig(), 64, None, "float32", lossy=False)


def test_a_lossy_export_says_what_is_lost():
    position = PositionConfig(kind="rerope", window=8, log_n="trained")
    _, lost = exported_config(network("llama"), position, 64, None, "float32", lossy=True)
    assert len(lost) == 2 and "becomes plain RoPE" in lost[0] and "log n" in lost[1]


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "config.json is a GPT2LMHeadModel; those that can be imported"),
        ({"architectures": None, "model_type": "bert"}, "config.json is a bert; those that can be imported"),
        ({"architectures": None, "model_type": None}, "config.json names neither architectures nor model_type; those"),
        ({"hidden_act": "gelu"}, "config.json has hidden_act = gelu, tiglon's networks have silu"),
        ({"hidden_size": None}, "config.json has no hidden_size; add it"),
        ({"hidden_size": True}, "config.json has hidden_size = True, which is no number"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8}}, "config.json has rope_type = 'llama3'"),
    ],
)
def test_what_tiglon_does_not_compute_is_refused(change: dict, sentence: str):
    config, _ = exported_config(network("llama"), PositionConfig(), 64, None, "float32", lossy=False)
    with pytest.raises(ValueError, match=sentence):
        imported_config(config | change, "config.json")
