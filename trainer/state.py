"""The progress of a run: one small frozen value."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class State:
    """What the loop keeps besides weights and optimizer state."""

    step: int = 0
    """Finished updates."""
    tokens: int = 0
    """Target tokens seen."""
    batch: int = 0
    """Index of the next global batch, the whole state of the data; larger than `step` where a rewind passed over batches."""

    def after(self, tokens: int) -> "State":
        """The state after one update on `tokens` target tokens."""
        return State(self.step + 1, self.tokens + tokens, self.batch + 1)

    def with_batch(self, batch: int) -> "State":
        """The same state with another next batch."""
        return replace(self, batch=batch)


def due(step: int, every_steps: int) -> bool:
    """Whether what is done every `every_steps` steps (0 = never) is done after this one."""
    return every_steps > 0 and step % every_steps == 0
