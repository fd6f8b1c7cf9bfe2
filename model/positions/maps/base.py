"""What a position map says: from the distance r = i - j of a query i and a key j to the rotation between them."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor


class PositionKeys(BaseModel):
    """Keys of [position] that every map takes; the keys of a map's own are a subclass beside it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: str = Field(default="rope", description="The map; leaky-rerope with leak < 1 is inverse Leaky ReRoPE.")
    rope_theta: float = Field(default=10000.0, gt=1, description="Base of the rotary frequencies.")
    windowed_rope_theta: float | None = Field(
        default=None,
        gt=1,
        description="Base of plain RoPE in windowed layers, without what the map does to distances, frequencies and logits "
        "(Gemma 3, OLMo 3); none = they have the map's near rotation.",
    )
    trained_length: int | None = Field(
        default=None,
        gt=0,
        description="yarn, llama3, log_n: length L_tr (tokens) the model was trained at. Default train.sequence_length.",
    )
    log_n: Literal["none", "trained", "inference"] = Field(
        default="none",
        description="Scale q by log(n)/log(L_tr): trained and evaluated with it (unclipped), or evaluated only (at least 1).",
    )


@dataclass(frozen=True)
class FarRegion:
    """Distances that are rotated by another rule: r >= window is rotated by window + slope (r - window) positions."""

    window: int
    """Tokens: distances below it are near."""
    slope: float
    """Positions that one more token adds."""


Keys = TypeVar("Keys", bound=PositionKeys, covariant=True)


@dataclass(frozen=True)
class PositionMap(Generic[Keys]):
    """One map under the values of its keys. The defaults of the methods are RoPE's; a map overrides what differs."""

    position: Keys

    keys: ClassVar[type[PositionKeys]] = PositionKeys
    """The keys it takes; others are refused."""
    title: ClassVar[str] = ""
    """Its name in words, for maps with a far region."""
    rotates: ClassVar[bool] = True
    stock: ClassVar[str | None] = ""
    """None: no stock architecture has it; else under which condition one has, "" = always."""

    def problem(self) -> str:
        """What is wrong with the values of its keys together, to follow "kind = ..."; "" if nothing."""
        return ""

    def near_rotation(self, distance: Tensor) -> Tensor:
        """Rotation, in positions, of near distances (float64, any shape): a multiple of the distance."""
        return distance

    def far_region(self) -> FarRegion | None:
        """Distances that are rotated by another rule; None = all are near."""
        return None

    def relative_position(self, distance: Tensor) -> Tensor:
        """Rotation, in positions, between a query and a key `distance` >= 0 tokens before it; float64, any shape.

        The definition: rotary caches (model/positions/rope.py) reproduce it, tests compare with it.
        """
        r, far = distance.double(), self.far_region()
        near = self.near_rotation(r)
        return near if far is None else torch.where(r < far.window, near, far.window + far.slope * (r - far.window))

    def frequencies(self, size: int, trained_length: int) -> Tensor:
        """Radians per position of each pair of the `size` rotated channels, float64 [size / 2]."""
        index = torch.arange(size // 2, dtype=torch.float64)
        return self.position.rope_theta ** (-2 * index / size)

    def query_scale(self) -> float:
        """Factor on every query."""
        return 1.0

    def rotated_factor(self) -> float:
        """Factor on what is rotated of queries and of keys: part of the rotary cache."""
        return 1.0

    def length_factor(self) -> float:
        """Times the trained length that it can be used at: its context extension."""
        return 1.0

    def usable_length(self, largest: float) -> int | None:
        """Tokens over which no rotation is above `largest` (positions); None = no limit.

        The limit on k of Leaky ReRoPE and its inverse is Su 2023, kexue.fm/archives/9728.
        """
        far, largest = self.far_region(), largest * self.length_factor()
        if far is None or far.window > largest:
            return math.floor(largest) + 1
        return None if far.slope == 0 else far.window + math.floor((largest - far.window) / far.slope) + 1

    def rope_parameters(self, attention: str, rotary_size: int, trained_length: int) -> dict[str, Any] | None:
        """Hugging Face's rope_parameters of this map, or of what comes nearest (`lost`); None = nothing does.

        Args:
            attention: the kind, model.attention.
            rotary_size: channels of a head that are rotated.
            trained_length: tokens.
        """
        return {"rope_type": "default", "rope_theta": self.position.rope_theta}

    def lost(self) -> str:
        """What rope_parameters leaves out, one sentence; "" if nothing."""
        return ""
