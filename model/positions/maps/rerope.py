"""ReRoPE, Leaky ReRoPE and its inverse: distances from a window on grow more slowly, or faster, than the distance itself."""

from typing import TypeVar

from pydantic import Field

from model.positions.maps.base import FarRegion, PositionKeys, PositionMap


class ReRopeKeys(PositionKeys):
    """Keys of ReRoPE."""

    window: int | None = Field(default=None, description="rerope, leaky-rerope: distances below it are exact (tokens).")


class LeakyReRopeKeys(ReRopeKeys):
    """Keys of Leaky ReRoPE."""

    leak: float | None = Field(
        default=None, description="leaky-rerope: k of the posts, a step of 1/k beyond the window; below 1 is the inverse."
    )


Windowed = TypeVar("Windowed", bound=ReRopeKeys, covariant=True)


class WindowedMap(PositionMap[Windowed]):
    """A map with a far region."""

    keys = ReRopeKeys

    def problem(self) -> str:
        """No window."""
        window = self.position.window
        return f"needs window >= 1 (tokens), got {window}" if window is None or window < 1 else ""

    def slope(self) -> float:
        """Positions that one more token beyond the window adds."""
        return 0.0

    def far_region(self) -> FarRegion:
        """From the window on."""
        assert self.position.window is not None  # see problem
        return FarRegion(self.position.window, self.slope())

    def lost(self) -> str:
        """The window."""
        return f"becomes plain RoPE: distances from {self.position.window} tokens on differ"


class ReRope(WindowedMap[ReRopeKeys]):
    """The window at every distance beyond it (Su 2023, kexue.fm/archives/9708)."""

    title = "ReRoPE"
    stock = None


class LeakyReRope(WindowedMap[LeakyReRopeKeys]):
    """Steps of 1 / leak beyond the window (Su 2023, kexue.fm/archives/9708); leak < 1 is the inverse, for training (9728)."""

    keys = LeakyReRopeKeys
    title = "Leaky ReRoPE"
    stock = None

    def problem(self) -> str:
        """No window or no leak."""
        leak = self.position.leak
        missing = f"needs leak > 0 (1/leak is the step beyond the window), got {leak}" if leak is None or leak <= 0 else ""
        return super().problem() or missing

    def slope(self) -> float:
        """1 / leak."""
        return 1.0 / (self.position.leak or 1.0)
