"""What the maps that extend a context by a factor share."""

from typing import TypeVar

from pydantic import Field

from model.positions.maps.base import PositionKeys, PositionMap


class ScaledKeys(PositionKeys):
    """The key of every context extension."""

    factor: float = Field(
        default=1.0, ge=1, description="pi, ntk, ntk-mixed, yarn, llama3: context extension s = evaluated / trained length."
    )


Scaled = TypeVar("Scaled", bound=ScaledKeys, covariant=True)


class ScaledMap(PositionMap[Scaled]):
    """A map under which `factor` times the trained length can be used."""

    keys = ScaledKeys

    def length_factor(self) -> float:
        """The factor."""
        return self.position.factor
