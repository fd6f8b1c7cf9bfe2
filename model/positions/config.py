"""Configuration of the position map, and the table of the maps."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from pydantic import Field, model_validator

from model.positions.maps.base import PositionKeys, PositionMap
from model.positions.maps.llama3 import Llama3, Llama3Keys
from model.positions.maps.none import NoPositions
from model.positions.maps.ntk import Ntk, NtkMixed, NtkMixedKeys
from model.positions.maps.pi import Interpolation
from model.positions.maps.rerope import LeakyReRope, LeakyReRopeKeys, ReRope
from model.positions.maps.rope import Rope
from model.positions.maps.yarn import Yarn, YarnKeys

POSITION_MAPS: dict[str, type[PositionMap[Any]]] = {
    "rope": Rope, "none": NoPositions, "pi": Interpolation, "ntk": Ntk, "ntk-mixed": NtkMixed, "yarn": Yarn,
    "llama3": Llama3, "rerope": ReRope, "leaky-rerope": LeakyReRope,
}  # fmt: skip
"""Every map by its `kind`."""
MAP_KEYS = tuple(dict.fromkeys(key for made in POSITION_MAPS.values() for key in made.keys.model_fields))
"""Keys of [position]."""
SHARED_KEYS = tuple(key for key in PositionKeys.model_fields if key != "kind")
"""Those that every map takes."""
OWN_KEYS = tuple(key for key in MAP_KEYS if key not in PositionKeys.model_fields)
"""Those that have a meaning for some maps only."""

if TYPE_CHECKING:
    PositionKind = str
else:
    PositionKind = Literal[tuple(POSITION_MAPS)]


class PositionConfig(LeakyReRopeKeys, NtkMixedKeys, YarnKeys, Llama3Keys):
    """A map from the distance r = i - j to the rotation between a query i and a key j."""

    kind: PositionKind = Field(default="rope", description="The map; leaky-rerope with leak < 1 is inverse Leaky ReRoPE.")

    @property
    def map(self) -> PositionMap[Self]:
        """The map under these values."""
        return POSITION_MAPS[self.kind](self)

    @property
    def of_windowed_layers(self) -> "PositionConfig":
        """The map whose near rotation and query factor windowed layers have."""
        theta = self.windowed_rope_theta
        return self if theta is None else PositionConfig(kind="rope", rope_theta=theta)

    def evaluation_values(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Values of another map that evaluates a network trained with this one: what training depends on stays unless given."""
        return {name: getattr(self, name) for name in SHARED_KEYS} | dict(values)

    def usable_length(self, trained: "PositionConfig", trained_length: int) -> int | None:
        """Tokens over which every rotation of this map was met in training with `trained`; None = no limit."""
        return self.map.usable_length(float(trained.map.relative_position(torch.tensor(trained_length - 1))))

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.log_n != "none" and self.trained_length == 1:
            raise ValueError(f"log_n = '{self.log_n}' divides by log(trained_length), which is 0 for 1; use 2 or more")
        for key in OWN_KEYS:
            value = getattr(self, key)
            if key not in self.map.keys.model_fields and value != type(self).model_fields[key].default:
                kinds = " or ".join(kind for kind, made in POSITION_MAPS.items() if key in made.keys.model_fields)
                raise ValueError(f"{key} = {value} has no meaning for kind = '{self.kind}'; remove it or use {kinds}")
        if problem := self.map.problem():
            raise ValueError(f"kind = '{self.kind}' {problem}")
        return self
