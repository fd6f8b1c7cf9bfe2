"""Configuration of the network, named as Hugging Face names it."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class ModelConfig(BaseModel):
    """A decoder-only transformer: RMSNorm, rotary attention, SwiGLU, tied or untied head."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    vocab_size: int = Field(default=4096, gt=0, description="Tokens of the tokenizer; rows of the embedding.")
    hidden_size: int = Field(default=256, gt=0, description="Width D of the residual stream.")
    intermediate_size: int = Field(default=704, gt=0, description="Width F of the SwiGLU mlp.")
    num_hidden_layers: int = Field(default=6, gt=0, description="Transformer blocks.")
    num_attention_heads: int = Field(default=4, gt=0, description="Query heads N.")
    num_key_value_heads: int | None = Field(
        default=None, gt=0, description="Key and value heads K: N is MHA, 1 is MQA, between is GQA. Default N. Unused by MLA."
    )
    head_dim: int | None = Field(default=None, gt=0, description="Width H of a head (even). Default hidden_size / heads.")
    rms_norm_eps: float = Field(default=1e-5, gt=0, description="Added to the mean square inside every RMSNorm.")
    initializer_range: float = Field(default=0.02, gt=0, description="Standard deviation sigma of the initial matrices.")
    residual_init: Literal["scaled", "plain", "zero"] = Field(
        default="scaled",
        description="Initial o_proj and down_proj: sigma / sqrt(2 * layers), sigma, or zero.",
    )

    tie_word_embeddings: bool = Field(default=True, description="Share the embedding with the output head.")
    tied_head: Literal["half-swap", "plain", "projection", "small-init"] = Field(
        default="half-swap",
        description="How a tied head keeps the first loss at log V (Su 2023, kexue.fm/archives/9698); unused when untied.",
    )

    attention: Literal["gqa", "mla"] = Field(default="gqa", description="Grouped-query or multi-head latent attention.")
    q_lora_rank: int | None = Field(default=None, gt=0, description="MLA: rank of the query latent; none = full-rank queries.")
    kv_lora_rank: int | None = Field(default=None, gt=0, description="MLA: width of the cached key-value latent.")
    qk_nope_head_dim: int | None = Field(default=None, gt=0, description="MLA: part of a head without rotation.")
    qk_rope_head_dim: int | None = Field(default=None, gt=0, description="MLA: rotated part of a head (even).")
    v_head_dim: int | None = Field(default=None, gt=0, description="MLA: width of a value head.")
    qk_norm: Literal["none", "rms", "key-l2"] = Field(
        default="none",
        description="Normalise queries and keys (rms), or keys only and without 1/sqrt(H) "
        "(key-l2; Su 2023, kexue.fm/archives/9859).",
    )

    sliding_window: int | None = Field(
        default=None, gt=0, description="Tokens a windowed layer sees, itself included; none = every layer is full."
    )
    full_attention_layers: list[int] = Field(
        default_factory=list, description="Layers (negative from the end) that stay full when sliding_window is set."
    )
    full_attention_position: Literal["same", "none"] = Field(
        default="same", description="Positions of the full layers beside windowed ones: HWFA none, HWFA2 same."
    )

    @property
    def kv_heads(self) -> int:
        """Key-value heads, with the default filled in."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """Width of a query/key head as the scores see it."""
        if self.attention == "mla":
            return (self.qk_nope_head_dim or 0) + (self.qk_rope_head_dim or 0)
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rotary_size(self) -> int:
        """Channels of a head that are rotated."""
        return (self.qk_rope_head_dim or 0) if self.attention == "mla" else self.head_size

    @property
    def value_size(self) -> int:
        """Width of a value head."""
        return (self.v_head_dim or 0) if self.attention == "mla" else self.head_size

    def full_layer(self, layer: int) -> bool:
        """Whether a layer attends to everything before it."""
        full = {index % self.num_hidden_layers for index in self.full_attention_layers}
        return self.sliding_window is None or layer in full

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        heads, kv_heads = self.num_attention_heads, self.kv_heads
        if self.attention == "mla":
            need = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
            missing = [name for name in need if getattr(self, name) is None]
            if missing:
                raise ValueError(
                    f"attention = 'mla' needs {', '.join(missing)}; set {'it' if len(missing) == 1 else 'them'} in [model]"
                )
            if self.qk_norm != "none":
                raise ValueError(
                    f"qk_norm = '{self.qk_norm}' cannot be used with attention = 'mla': absorbed decoding never computes "
                    "the keys that would be normalised; use qk_norm = 'none'"
                )
        else:
            if heads % kv_heads:
                raise ValueError(f"num_attention_heads = {heads} must be a multiple of num_key_value_heads = {kv_heads}")
            if self.head_dim is None and self.hidden_size % heads:
                raise ValueError(
                    f"hidden_size = {self.hidden_size} is not divisible by num_attention_heads = {heads}; set head_dim"
                )
        if self.rotary_size % 2:
            name = "qk_rope_head_dim" if self.attention == "mla" else "head_dim"
            raise ValueError(f"{name} = {self.rotary_size} must be even: rotary positions rotate channels in pairs")
        if self.tie_word_embeddings and self.tied_head == "half-swap" and self.hidden_size % 2:
            raise ValueError(f"tied_head = 'half-swap' needs an even hidden_size, got {self.hidden_size}")
        if self.sliding_window is None and self.full_attention_layers:
            raise ValueError("full_attention_layers needs sliding_window: without it every layer is full")
        for layer in self.full_attention_layers:
            if not -self.num_hidden_layers <= layer < self.num_hidden_layers:
                raise ValueError(
                    f"full_attention_layers has {layer}, but the layers run from 0 to {self.num_hidden_layers - 1}"
                )
        return self
