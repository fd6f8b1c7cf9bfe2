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
    qk_norm: Literal["none", "rms", "key-l2"] = Field(
        default="none",
        description="Normalise queries and keys (rms), or keys only and without 1/sqrt(H) "
        "(key-l2; Su 2023, kexue.fm/archives/9859).",
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
        full = {index % self.num_hidden_layers for index in self.full_attention_layers}
        return self.sliding_window is None or layer in full

    def check_rotary(self, key: str) -> None:
        """Refuse a rotated part of a head whose width, set by `key`, is odd. Raises ValueError, one sentence."""
        if self.rotary_size % 2:
            raise ValueError(f"{key} = {self.rotary_size} must be even: rotary positions rotate channels in pairs")

    def check_layers(self) -> None:
        """Refuse a list of full layers that means nothing. Raises ValueError, one sentence."""
        if self.sliding_window is None and self.full_attention_layers:
            raise ValueError("full_attention_layers needs sliding_window: without it every layer is full")
        for layer in self.full_attention_layers:
            if not -self.num_hidden_layers <= layer < self.num_hidden_layers:
                raise ValueError(
                    f"full_attention_layers has {layer}, but the layers run from 0 to {self.num_hidden_layers - 1}"
                )
