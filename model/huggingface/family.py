"""A family of Hugging Face models: what its config.json says of the network, and how its tensors are named."""

from collections.abc import Mapping
from typing import Any, ClassVar

from model.config import ModelConfig
from model.huggingface.reader import ConfigReader
from model.huggingface.rope import read_rope, written_rope
from model.positions.config import PositionConfig

HARMLESS = frozenset({
    "_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "architectures", "model_type", "auto_map", "dtype",
    "torch_dtype", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id",
    "pretraining_tp", "return_dict", "output_hidden_states", "output_attentions", "attn_implementation", "_attn_implementation",
    "_attn_implementation_autoset", "_attn_implementation_internal", "experts_implementation",
    "_experts_implementation_internal", "id2label", "label2id", "num_labels", "problem_type", "finetuning_task",
    "task_specific_params", "tokenizer_class", "prefix", "tie_last_hidden_states",
})  # fmt: skip
"""Keys of any config.json that change nothing in what the network computes: where it came from, how it is stored and run, the
ids of special tokens (kept for the way out), labels of classifiers. `auto_map` names code that is never run."""
SAMPLING = frozenset({
    "max_length", "max_new_tokens", "min_length", "min_new_tokens", "max_time", "stop_strings", "early_stopping", "do_sample",
    "num_beams", "num_beam_groups", "penalty_alpha", "cache_implementation", "cache_config", "temperature", "top_k", "top_p",
    "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "diversity_penalty", "repetition_penalty",
    "encoder_repetition_penalty", "encoder_no_repeat_ngram_size", "length_penalty", "no_repeat_ngram_size", "bad_words_ids",
    "force_words_ids", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values", "suppress_tokens",
    "begin_suppress_tokens", "sequence_bias", "guidance_scale", "num_return_sequences", "output_scores", "output_logits",
    "return_dict_in_generate", "exponential_decay_length_penalty", "renormalize_logits", "low_memory", "constraints",
    "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_lookbehind",
    "target_lookbehind", "prompt_lookup_num_tokens",
})  # fmt: skip
"""Keys that rule how text is sampled; older files have them in config.json."""
COMMON_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "hidden_act": "silu",
    "initializer_range": 0.02, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "attention_dropout": 0.0,
    "chunk_size_feed_forward": 0, "is_encoder_decoder": False,
}  # fmt: skip


class Family:
    """One architecture of transformers. A family is a subclass in a file of its own and an entry in
    model.huggingface.families.FAMILIES; what differs from Llama is overridden."""

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    attention: ClassVar[str] = "gqa"
    """The kind of attention that it has."""
    defaults: ClassVar[Mapping[str, Any]]
    """Of transformers' configuration class, for keys that a file leaves out."""
    harmless: ClassVar[frozenset[str]] = frozenset()
    """Keys of its own that change nothing in what the network computes."""
    activations: ClassVar[Mapping[str, str]] = {"silu": "swiglu", "gelu_pytorch_tanh": "geglu"}
    """Its activation -> our kind of feed-forward layer."""
    activation_key: ClassVar[str] = "hidden_act"
    with_experts: ClassVar[bool] = False
    """Whether layers may have experts, beside the kinds of `activations`."""
    theta: ClassVar[float] = 10000.0
    """Base of the rotary frequencies where a file gives none."""
    whole_heads: ClassVar[bool] = False
    """transformers wants hidden_size to be a multiple of num_attention_heads."""
    fused: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Its tensors in a layer that hold several of ours, one below the other."""

    def read(self, config: ConfigReader) -> tuple[dict[str, Any], dict[str, Any], int]:
        """[model] and [position] of a config.json, and the training length in tokens.

        Raises:
            ValueError: one sentence, for a key that means something that tiglon does not compute.
        """
        for key in ("attention_dropout", "chunk_size_feed_forward"):
            config.only(key, *((0, 0.0, None) if key == "attention_dropout" else (0,)))
        config.only("is_encoder_decoder", False)
        model: dict[str, Any] = {key: config.size(key) for key in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        )}  # fmt: skip
        model |= {key: config.number(key) for key in ("rms_norm_eps", "initializer_range")}
        model |= {"tie_word_embeddings": config.flag("tie_word_embeddings"), "tied_head": "plain"}
        model |= self.read_feed_forward(config, model["num_hidden_layers"])
        if self.whole_heads and model["hidden_size"] % model["num_attention_heads"]:
            raise config.refusal("hidden_size", f"is no multiple of num_attention_heads = {model['num_attention_heads']}")
        model |= self.read_attention(config, model["num_hidden_layers"])
        position, length = self.read_positions(config, config.size("max_position_embeddings"))
        if "sliding_window" not in model:
            position.pop("windowed_rope_theta", None)
        return model, position, length

    def read_attention(self, config: ConfigReader, layers: int) -> dict[str, Any]:
        """[model] as far as it is attention's or the family's own."""
        return read_heads(config)

    def read_feed_forward(self, config: ConfigReader, layers: int) -> dict[str, Any]:
        """[model] as far as it is the feed-forward layers'."""
        return {"feed_forward": self.activations[config.choice(self.activation_key, self.activations)]}

    def read_positions(self, config: ConfigReader, length: int) -> tuple[dict[str, Any], int]:
        """[position], and the training length in tokens, given max_position_embeddings."""
        return read_rope(config, length, self.theta)

    def feed_forwards(self) -> list[str]:
        """Our kinds of feed-forward layers that it has."""
        return [*self.activations.values(), *(["moe"] if self.with_experts else [])]

    def stored_name(self, name: str) -> str:
        """Its name for one of our tensors."""
        return name

    def further_layers(self, config: Mapping[str, Any]) -> int:
        """Layers that files may hold behind those of the network, of which they are no part."""
        return 0

    def write(self, model: ModelConfig, position: PositionConfig, rope: dict[str, Any]) -> dict[str, Any]:
        """Keys of config.json beyond those that all families share. What the family cannot say is left out: a network is
        exported only as what reads back as the same network.

        Args:
            rope: rope_parameters of the map.
        """
        return {**written_heads(model), **self.write_rope(position, rope)}

    def write_rope(self, position: PositionConfig, rope: dict[str, Any]) -> dict[str, Any]:
        """rope_parameters of the map as keys of config.json."""
        return written_rope(rope)


def read_heads(config: ConfigReader) -> dict[str, Any]:
    """num_key_value_heads and head_dim, where they are given."""
    heads = config.size("num_attention_heads")
    model = {"num_key_value_heads": config.optional_size("num_key_value_heads") or heads}
    if heads % model["num_key_value_heads"]:
        raise config.refusal("num_key_value_heads", f"does not divide num_attention_heads = {heads}")
    may_be_null = "head_dim" in config.defaults and config.defaults["head_dim"] is None
    width = config.size("head_dim") if "head_dim" in config and not may_be_null else config.optional_size("head_dim")
    if width is None and config.size("hidden_size") < heads:
        raise config.refusal("num_attention_heads", f"is above hidden_size = {config.size('hidden_size')}")
    return {**model, "head_dim": width or config.size("hidden_size") // heads}


def written_heads(model: ModelConfig) -> dict[str, Any]:
    """The same on the way out."""
    return {"num_key_value_heads": model.kv_heads, "head_dim": model.head_size}


def read_windows(config: ConfigReader, layers: int, kinds: list[str]) -> dict[str, Any]:
    """sliding_window and full_attention_layers.

    Args:
        kinds: of each layer where layer_types does not say: full_attention or sliding_attention.
    """
    window = config.optional_size("sliding_window")
    given = config.entries("layer_types", layers)
    kinds = kinds if given is None else given
    if unknown := [kind for kind in kinds if kind not in ("full_attention", "sliding_attention")]:
        raise config.refusal("layer_types", f"has {unknown[0]!r}; tiglon has full and sliding attention")
    full = [layer for layer, kind in enumerate(kinds) if kind == "full_attention"]
    if len(full) == layers:
        return {}
    if window is None:
        raise config.refusal("layer_types", "has sliding_attention without a sliding_window")
    return {"sliding_window": window, "full_attention_layers": full}


def read_switched_windows(config: ConfigReader, kinds: list[str]) -> dict[str, Any]:
    """The same in families that have windows only if use_sliding_window is true."""
    if config.flag("use_sliding_window") and config.take("sliding_window") is not None:
        return read_windows(config, len(kinds), kinds)
    config.optional_size("sliding_window")
    types = config.entries("layer_types", len(kinds))
    if types is not None and any(kind != "full_attention" for kind in types):
        window = config.take("sliding_window")
        switch = f"use_sliding_window = {str(config.flag('use_sliding_window')).lower()} and sliding_window = {window}"
        raise config.refusal("layer_types", f"has sliding attention beside {switch}")
    return {}


def written_windows(model: ModelConfig) -> dict[str, Any]:
    """The same on the way out."""
    full = [model.full_layer(layer) for layer in range(model.num_hidden_layers)]
    types = ["full_attention" if each else "sliding_attention" for each in full]
    return {"sliding_window": model.sliding_window, "layer_types": types}


def written_switched_windows(model: ModelConfig) -> dict[str, Any]:
    """The same in families that have windows only if use_sliding_window is true."""
    windows = written_windows(model)
    return windows | {"use_sliding_window": "sliding_attention" in windows["layer_types"]}
