"""What a layer sees: everything or a sliding window, with positions or without (HWFA, kexue 9603; HWFA2, kexue 9731)."""

from torch import Tensor

from model.config import ModelConfig
from model.heads import Heads
from model.positions import Reading, rotate


class Place:
    """The rules of one layer in the pattern.

    Windowed layers always turn plainly, since their distances are short, and have no log n; YaRN's factor acts in them too.
    Full layers beside windowed ones read with the run's map (HWFA2) or without positions (HWFA), where log n, if the run
    has it, applies to them.
    """

    def __init__(self, config: ModelConfig, layer: int):
        full = config.full_layer(layer)
        self.sliding_window = None if full else config.sliding_window
        self.turns = not (full and config.sliding_window is not None and config.full_attention_position == "none")

    def heads(self, q: Tensor, k: Tensor, v: Tensor, reading: Reading, far: bool, interleaved: bool = False) -> Heads:
        """Rotated queries and keys.

        Args:
            q, k, v: [B, S, heads, size] before rotation.
            reading: positions of this forward pass.
            far: make the far parts too, where the layer can have them.
            interleaved: channels are paired (2c, 2c + 1).
        """
        factor, near = self._factor(reading), reading.near if self.turns else None
        near_q, near_k = rotate(q, near, factor, interleaved), rotate(k, near, None, interleaved)
        if not (far and self.two_regions(reading)):
            return Heads(near_q, near_k, v)
        far_q = rotate(q, reading.far_query, factor, interleaved)
        # ReRoPE leaves far keys unrotated; interleaved ones must still be ordered as the queries are.
        far_k = rotate(k, reading.far_key, None, interleaved) if reading.far_key else _ordered(k, interleaved)
        return Heads(near_q, near_k, v, far_q, far_k)

    def scale(self, q: Tensor, reading: Reading) -> Tensor:
        """The part of the queries that is not rotated, [B, S, n, size], times log n."""
        return rotate(q, None, self._factor(reading))

    def two_regions(self, reading: Reading) -> bool:
        """Whether the layer's map has a far region at all."""
        return self.turns and self.sliding_window is None and reading.window is not None

    def window(self, reading: Reading) -> int | None:
        """The window for the kernel: None where everything seen lies in one region."""
        if self.sliding_window is not None:
            return self.sliding_window if self.sliding_window < reading.sequence else None
        return reading.window if self.two_regions(reading) and reading.split else None

    def _factor(self, reading: Reading) -> Tensor | None:
        return reading.factor if self.sliding_window is None else reading.windowed_factor


def _ordered(k: Tensor, interleaved: bool) -> Tensor:
    return k.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2) if interleaved else k
