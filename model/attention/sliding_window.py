"""What a layer sees: everything or a sliding window, with rotary positions or without.

Windowed layers below full ones are HWFA, whose full layers have no positions (Su 2023, kexue.fm/archives/9603), and HWFA2,
whose full layers have the map of the run (Su 2023, kexue.fm/archives/9731).
"""

from torch import Tensor

from model.attention.heads import AttentionConfig
from model.attention.kernels.inputs import AttentionInputs
from model.positions.batch import Positions
from model.positions.rope import RotaryCache, apply_rotary


class LayerPositions:
    """Window and rotation of one layer.

    Windowed layers have the near rotation of the map, since their distances are short, and no log n; YaRN's scale acts in
    them too. With position.windowed_rope_theta they have plain RoPE of that base and no scale. Full layers beside windowed
    ones have the run's map (HWFA2) or no positions (HWFA), where log n, if the run has it, and YaRN's scale apply to them.
    A layer of layers_without_positions has nothing of the map: of all scales log n alone, and that where it is full.
    """

    def __init__(self, config: AttentionConfig, layer: int):
        self.sliding_window = None if config.full_layer(layer) else config.sliding_window
        self.rotates, self.listed = config.rotated_layer(layer), config.listed_without_positions(layer)
        self.takes_far_region = self.rotates and self.sliding_window is None
        """Whether the layer has the map's far region, if it has one."""

    def rotate_inputs(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Positions, far: bool, interleaved: bool = False
    ) -> AttentionInputs:
        """Rotated queries and keys.

        Args:
            q, k, v: [B, S, heads, size] before rotation.
            positions: positions of this forward pass.
            far: make the far queries and keys too, where the layer has a far region.
            interleaved: channels are paired (2c, 2c + 1).
        """
        near_q, far_q = self.rotate_queries(q, positions, far, interleaved)
        near_k, far_k = self.rotate_keys(k, positions, far, interleaved)
        return AttentionInputs(near_q, near_k, v, far_q, far_k)

    def rotate_queries(
        self, q: Tensor, positions: Positions, far: bool, interleaved: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Queries [B, S, n, size], rotated for near keys and, where the layer has a far region and `far`, for far ones."""
        scale, near = self._query_scale(positions), None
        if self.rotates:
            near = positions.near_query if self.sliding_window is None else positions.windowed_near_query
        near_q = apply_rotary(q, near, scale, interleaved)
        if not (far and self.two_regions(positions)):
            return near_q, None
        return near_q, apply_rotary(q, positions.far_query, scale, interleaved)

    def rotate_keys(
        self, k: Tensor, positions: Positions, far: bool, interleaved: bool = False, start: int = 0
    ) -> tuple[Tensor, Tensor | None]:
        """The same of keys [B, tokens, k, size], of which the first is the token `start`."""

        def rotated(cache: RotaryCache | None) -> Tensor:
            return apply_rotary(k, cache and cache.narrow(start, k.shape[1]), None, interleaved)

        near = None
        if self.rotates:
            near = positions.near_key if self.sliding_window is None else positions.windowed_near_key
        if not (far and self.two_regions(positions)):
            return rotated(near), None
        # ReRoPE leaves far keys unrotated; interleaved ones must still be ordered as the queries are.
        return rotated(near), rotated(positions.far_key) if positions.far_key else _deinterleave(k, interleaved)

    def scale_queries(self, q: Tensor, positions: Positions) -> Tensor:
        """The part of the queries that is not rotated, [B, S, n, size], times log n and YaRN's scale."""
        return apply_rotary(q, None, self._query_scale(positions))

    def two_regions(self, positions: Positions) -> bool:
        """Whether the layer has a far region at all."""
        return self.takes_far_region and positions.window is not None

    def has_far_pairs(self, positions: Positions) -> bool:
        """Whether the layer has a far region and the row is longer than its window."""
        return self.two_regions(positions) and positions.has_far_pairs

    def kernel_window(self, positions: Positions) -> int | None:
        """The window for the kernel (tokens): None where everything seen lies in one region."""
        if self.sliding_window is not None:
            return self.sliding_window if self.sliding_window < positions.tokens.sequence else None
        return positions.window if self.has_far_pairs(positions) else None

    def _query_scale(self, positions: Positions) -> Tensor | None:
        if self.sliding_window is not None:
            return None if self.listed else positions.windowed_query_scale
        return positions.unrotated_query_scale if self.listed else positions.query_scale


def _deinterleave(k: Tensor, interleaved: bool) -> Tensor:
    """First members of all pairs, then the second ones, as apply_rotary orders them."""
    return k.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2) if interleaved else k
