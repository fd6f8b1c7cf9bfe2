"""Position interpolation: distances divided by the factor (Chen et al. 2023, arXiv 2306.15595)."""

from typing import Any

from torch import Tensor

from model.positions.maps.scaled import ScaledKeys, ScaledMap


class Interpolation(ScaledMap[ScaledKeys]):
    """Rotation by r / factor."""

    def near_rotation(self, distance: Tensor) -> Tensor:
        """r / factor."""
        return distance / self.position.factor

    def rope_parameters(self, attention: str, rotary_size: int, trained_length: int) -> dict[str, Any]:
        """Linear scaling."""
        return {"rope_type": "linear", "rope_theta": self.position.rope_theta, "factor": self.position.factor}
