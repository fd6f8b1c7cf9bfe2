"""RoPE: distances as they are (Su et al. 2021, RoFormer, arXiv 2104.09864)."""

from model.positions.maps.base import PositionKeys, PositionMap


class Rope(PositionMap[PositionKeys]):
    """Rotation by the distance."""
