"""What decides which tokens each batch of a run holds. A checkpoint keeps it, so that a run that resumes can tell whether its
past is the same; the future may be another."""

from dataclasses import asdict, dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from data.corpus.batches import BatchSizes, Ramp

FINGERPRINT_DIGITS = 12
"""Digits of a fingerprint in a sentence."""
DECISIONS = {
    "seed": "run.seed", "sequence_length": "train.sequence_length", "tokenizer": "data.tokenizer", "pack": "data.pack",
}  # fmt: skip
"""Attributes of a plan that are the same for all batches, and the keys that set them."""


@dataclass(frozen=True)
class PlannedSource:
    """A corpus of a mixture."""

    fingerprint: str
    share: int
    """Whole number, in proportion to those of the other sources."""
    path: str
    """Where the corpus was; decides nothing."""


@dataclass(frozen=True)
class PlannedPhase:
    """A stretch of batches with one mixture."""

    from_step: int
    """Number of its first batch."""
    sources: tuple[PlannedSource, ...]


@dataclass(frozen=True)
class DataPlan:
    """The order of the data of a whole run."""

    seed: int
    sequence_length: int
    tokenizer: str
    sizes: BatchSizes
    phases: tuple[PlannedPhase, ...]
    pack: str = "stream"
    length_ramp: tuple[tuple[int, int], ...] = ()
    """(until, tokens): the rows of the batches before number `until`, in order, where they are shorter."""

    @property
    def lengths(self) -> Ramp:
        """Tokens of a row of every batch."""
        return Ramp(self.sequence_length, self.length_ramp)

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    def other_past(self, before: "DataPlan", batch: int) -> str:
        """How this plan contradicts what `before` had read up to a batch, in words; "" where it does not."""
        for key, name in DECISIONS.items():
            if (old := getattr(before, key)) != (new := getattr(self, key)):
                short = slice(FINGERPRINT_DIGITS) if key == "tokenizer" else slice(None)
                return f"{name} was {str(old)[short]} and is {str(new)[short]}"
        if batch and (difference := self._other_sizes(before, batch) or self._other_lengths(before, batch)):
            return difference
        difference = self._other_mixtures(before, batch)
        hint = f" (a change from here on is written as [[data.curriculum]] with from_step = {batch}, the next batch)"
        return difference and f"the mixture {difference}{hint}"

    def _other_sizes(self, before: "DataPlan", batch: int) -> str:
        old, new = (plan.sizes.until(batch) for plan in (before, self))
        if old == new:
            return ""
        ramp = ", ".join(f"[{until}, {size}]" for until, size in (*old.ramp, (batch, old.last)))
        return (
            f"the sizes of the {batch:,} batches so far were {old.words()} and are {new.words()} (train.batch_ramp = [{ramp}] "
            "keeps them, with what comes after; without a ramp, train.global_batch_size holds from here on)"
        )

    def _other_lengths(self, before: "DataPlan", batch: int) -> str:
        old, new = (plan.lengths.until(batch) for plan in (before, self))
        if old == new:
            return ""
        last = [(batch, old.last)] if old.last < self.sequence_length else []
        ramp = ", ".join(f"[{until}, {length}]" for until, length in (*old.ramp, *last))
        return (
            f"the rows of the {batch:,} batches so far had {old.words()} tokens and have {new.words()} (train.length_ramp = "
            f"[{ramp}] keeps them, with what comes after)"
        )

    def _other_mixtures(self, before: "DataPlan", batch: int) -> str:
        theirs, ours = ([phase for phase in plan.phases if phase.from_step < max(batch, 1)] for plan in (before, self))
        for old, new in zip(theirs, ours):
            if (old.from_step, _mixture(old)) != (new.from_step, _mixture(new)):
                return f"was {_words(old, new)} and is {_words(new, old)}"
        if len(theirs) < len(ours):
            return f"is {_words(ours[len(theirs)])}, and was not when those batches were read"
        if len(theirs) > len(ours):
            return f"was {_words(theirs[len(ours)])}, and this configuration has no such phase"
        return ""


def read_plan(record: Any) -> DataPlan:
    """What `DataPlan.record` gave. Raises ValueError for anything else: a checkpoint may be a stranger's."""
    try:
        return TypeAdapter(DataPlan).validate_python(record)
    except ValidationError:
        raise ValueError("no plan of data") from None


def _mixture(phase: PlannedPhase) -> list[tuple[str, int]]:
    return [(source.fingerprint, source.share) for source in phase.sources]


def _words(phase: PlannedPhase, other: PlannedPhase | None = None) -> str:
    """The mixture of a phase; with fingerprints where another has the same paths."""
    same = other is not None and [source.path for source in phase.sources] == [source.path for source in other.sources]
    parts = [
        f"{source.share} of {source.path}" + (f" ({source.fingerprint[:FINGERPRINT_DIGITS]})" if same else "")
        for source in phase.sources
    ]
    return f"{' to '.join(parts)} from batch {phase.from_step} on"
