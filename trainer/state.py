"""Where a run stands: one small frozen value."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class State:
    """Everything the loop carries besides weights and optimizer."""

    step: int = 0
    """Finished updates."""
    tokens: int = 0
    """Target tokens seen."""
    batch: int = 0
    """Number of the next global batch: the whole state of the data. Ahead of `step` where batches were skipped."""

    def after(self, tokens: int) -> "State":
        """The state after one update on `tokens` target tokens."""
        return State(self.step + 1, self.tokens + tokens, self.batch + 1)

    def reading_from(self, batch: int) -> "State":
        """The same state with the data cursor moved."""
        return replace(self, batch=batch)


def due(step: int, every_steps: int) -> bool:
    """Whether something done every so many steps (0 = never) is done after this one."""
    return every_steps > 0 and step % every_steps == 0
