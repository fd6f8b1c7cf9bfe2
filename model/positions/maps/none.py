"""No positions: queries and keys are not rotated."""

import torch
from torch import Tensor

from model.positions.maps.base import PositionKeys, PositionMap


class NoPositions(PositionMap[PositionKeys]):
    """No rotation at any distance."""

    rotates = False
    stock = None

    def near_rotation(self, distance: Tensor) -> Tensor:
        """Zero."""
        return torch.zeros_like(distance)

    def usable_length(self, largest: float) -> None:
        """No limit."""

    def rope_parameters(self, attention: str, rotary_size: int, trained_length: int) -> None:
        """None: no stock architecture leaves the rotation out."""
