"""Non-finite and spike rules, on values that all ranks have alike, so that they decide alike without collectives."""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from trainer.config import HealthConfig

Action = Literal["go", "skip", "rewind", "stop"]
LEAST_SAMPLES = 16
"""Losses in the window before a deviation is computed."""
LEAST_DEVIATION = 1e-3
"""Nats per token. Losses that hardly change have a deviation near zero, of which a rounding error would be a multiple."""


@dataclass(frozen=True)
class Verdict:
    """What to do after a step was checked.

    go: continue (a `sentence` is then for the record only); skip: the update was left out; rewind: load the last checkpoint and
    pass over the batches since; stop: end the run, the sentence says why.
    """

    action: Action
    what: Literal["", "non-finite", "spike"] = ""
    sentence: str = ""

    def record(self, step: int) -> dict[str, Any]:
        """The health record of metrics.jsonl."""
        return {"kind": "health", "step": step, "what": self.what, "action": self.action, "sentence": self.sentence}


HEALTHY = Verdict("go")


class Health:
    """Non-finite and spike rules over a window of recent losses.

    Its `state` is saved with a checkpoint: a resumed run decides as the unbroken one would have.
    """

    def __init__(self, settings: HealthConfig) -> None:
        self._settings = settings
        self._window: deque[float] = deque(maxlen=settings.spike_window_steps)
        self._left_out = 0  # consecutive updates
        self._rewinds = 0  # consecutive: without getting past the step of the last one
        self._furthest = 0  # the step of the last rewind

    def state(self) -> dict[str, Any]:
        """The accepted losses of the window, oldest first (nats per token), and the counts; fits JSON."""
        return {
            "losses": list(self._window), "left_out": self._left_out, "rewinds": self._rewinds, "furthest": self._furthest,
        }  # fmt: skip

    def resume(self, state: Mapping[str, Any]) -> None:
        """Continue from the `state` of a checkpoint; one of an older tiglon may lack keys."""
        self.rewind(state)
        self._rewinds, self._furthest = state.get("rewinds", 0), state.get("furthest", 0)

    def rewind(self, state: Mapping[str, Any]) -> None:
        """Go back to the `state` of a checkpoint, except for the number of rewinds."""
        self.forget()
        self._window.extend(state.get("losses", ()))
        self._left_out = state.get("left_out", 0)

    def forget(self) -> None:
        """Clear the window: the data change as planned, and earlier losses say nothing about later ones."""
        self._window.clear()

    def check(self, step: int, loss: float, skipped: bool) -> Verdict:
        """Check one step. Call it on every rank with the same values.

        Args:
            loss: mean over all ranks, nats per token.
            skipped: a gradient was NaN or infinite and the engine left the update out.
        """
        if skipped or not math.isfinite(loss):
            culprit = "the gradient is not finite" if math.isfinite(loss) else f"the loss is {loss}"
            return self._leave_out("non-finite", f"step {step}: {culprit}; the update was left out")
        if self.is_spike(loss):
            return self._spike(step, loss, self._deviations(loss))
        self._accept(step, loss)
        return HEALTHY

    def is_spike(self, loss: float | Tensor) -> bool:
        """Whether a loss is a spike, for use before the update; `check` decides the same."""
        sigmas = self._settings.spike_sigmas
        return bool(sigmas) and math.isfinite(loss) and self._deviations(float(loss)) > sigmas

    def _accept(self, step: int, loss: float) -> None:
        self._window.append(loss)
        self._left_out = 0
        if step > self._furthest:
            self._rewinds = 0

    def _deviations(self, loss: float) -> float:
        """Height of a loss above the window's mean, in standard deviations (math.fsum: the same on all ranks)."""
        count = len(self._window)
        if count < min(LEAST_SAMPLES, self._settings.spike_window_steps):
            return 0.0
        mean = math.fsum(self._window) / count
        deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in self._window) / count)
        return (loss - mean) / max(deviation, LEAST_DEVIATION)

    def _spike(self, step: int, loss: float, height: float) -> Verdict:
        spike = f"step {step}: the loss {loss:.4f} is {height:.1f} deviations above its running mean"
        match self._settings.spike_action:
            case "record":
                self._accept(step, loss)
                return Verdict("go", "spike", f"{spike}; recorded only")
            case "skip":
                return self._leave_out("spike", f"{spike}; the update was left out")
            case "rewind":
                self._rewinds, self._furthest = self._rewinds + 1, max(step, self._furthest)
                if self._rewinds >= self._settings.max_skipped_steps:
                    count = f"health.max_skipped_steps = {self._rewinds} times without getting past this step"
                    return Verdict("stop", "spike", f"{spike}; the run went back {count}, so it is ended{_ADVICE}")
                return Verdict("rewind", "spike", f"{spike}; going back to the last checkpoint and passing over these batches")
            case other:
                raise ValueError(f"health.spike_action = '{other}' must be record, skip or rewind")

    def _leave_out(self, what: Literal["non-finite", "spike"], sentence: str) -> Verdict:
        self._left_out += 1
        if self._left_out >= self._settings.max_skipped_steps:
            ended = f"health.max_skipped_steps = {self._left_out} in a row, so the run is ended"
            return Verdict("stop", what, f"{sentence}, {ended}{_ADVICE}")
        return Verdict("skip", what, f"{sentence} ({self._left_out} in a row)")


_ADVICE = "; lower the learning rate, or look at the data of these steps"
