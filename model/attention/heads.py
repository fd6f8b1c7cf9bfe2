"""Heads of attention: the keys that every kind of attention reads, and the sizes that follow from them."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from model.sublayer import MAY_CHANGE, StreamConfig


@dataclass(frozen=True)
class HeadSizes:
    """What a kind of attention makes of its keys."""

    kv_heads: int
    """Heads of keys and values in training."""
    head: int
    """Width of a query and key head as the scores see it."""
    rotary: int
    """Channels of a head that are rotated."""
    value: int
    """Width of a value head."""


class AttentionConfig(StreamConfig, frozen=True):
    """Query heads and what each layer sees."""

    num_attention_heads: int = Field(default=4, gt=0, description="Query heads N.")
    qk_norm: Literal["none", "rms", "rms-all-heads", "key-l2"] = Field(
        default="none",
        description="Normalise queries and keys, each head (rms) or all heads together (rms-all-heads, OLMo 2), or keys only "
        "and without 1/sqrt(H) (key-l2; Su 2023, kexue.fm/archives/9859).",
    )
    attention_bias: Literal["none", "qkv", "all"] = Field(
        default="none", description="Biases of the q, k and v projections (qkv, Qwen2), or of the output projection too (all)."
    )
    query_pre_attn_scalar: Annotated[float | None, MAY_CHANGE] = Field(
        default=None, ge=1e-6, le=1e9, description="Scores are divided by its square root (Gemma). Default head_dim."
    )
    sliding_window: Annotated[int | None, MAY_CHANGE] = Field(
        default=None, gt=0, description="Tokens a windowed layer sees, itself included; none = every layer is full."
    )
    full_attention_layers: Annotated[tuple[int, ...], MAY_CHANGE] = Field(
        default=(), description="Layers (negative from the end) that stay full when sliding_window is set."
    )
    full_attention_position: Annotated[Literal["same", "none"], MAY_CHANGE] = Field(
        default="same", description="Positions of the full layers beside windowed ones: HWFA none, HWFA2 same."
    )
    layers_without_positions: Annotated[tuple[int, ...], MAY_CHANGE] = Field(
        default=(),
        description="Layers (negative from the end), full or windowed, whose queries and keys are not rotated (SmolLM3).",
    )

    @property
    def head_sizes(self) -> HeadSizes:
        """Sizes of heads, by the kind of attention."""
        raise NotImplementedError

    @property
    def kv_heads(self) -> int:
        """Key-value heads, with the default filled in."""
        return self.head_sizes.kv_heads

    @property
    def head_size(self) -> int:
        """Width of a query/key head as the scores see it."""
        return self.head_sizes.head

    @property
    def rotary_size(self) -> int:
        """Channels of a head that are rotated."""
        return self.head_sizes.rotary

    @property
    def value_size(self) -> int:
        """Width of a value head."""
        return self.head_sizes.value

    def full_layer(self, layer: int) -> bool:
        """Whether a layer attends to everything before it."""
        return self.sliding_window is None or self._names(self.full_attention_layers, layer)

    def listed_without_positions(self, layer: int) -> bool:
        """Whether a layer is one of layers_without_positions, which leave out the map's query factors too."""
        return self._names(self.layers_without_positions, layer)

    def rotated_layer(self, layer: int) -> bool:
        """Whether queries and keys of a layer are rotated, by a map that rotates."""
        beside_windows = self.sliding_window is not None and self.full_layer(layer)
        unrotated = beside_windows and self.full_attention_position == "none"
        return not (unrotated or self.listed_without_positions(layer))

    def _names(self, layers: tuple[int, ...], layer: int) -> bool:
        return layer in {index % self.num_hidden_layers for index in layers}

    def check_rotary(self, key: str) -> None:
        """Refuse a rotated part of a head whose width, set by `key`, is odd. Raises ValueError, one sentence."""
        if self.rotary_size % 2:
            raise ValueError(f"{key} = {self.rotary_size} must be even: rotary positions rotate channels in pairs")

    def check_layers(self) -> None:
        """Refuse lists of layers that mean nothing. Raises ValueError, one sentence."""
        if self.sliding_window is None and self.full_attention_layers:
            raise ValueError("full_attention_layers needs sliding_window: without it every layer is full")
        for key in ("full_attention_layers", "layers_without_positions"):
            for layer in getattr(self, key):
                if not -self.num_hidden_layers <= layer < self.num_hidden_layers:
                    raise ValueError(f"{key} has {layer}, but the layers run from 0 to {self.num_hidden_layers - 1}")
