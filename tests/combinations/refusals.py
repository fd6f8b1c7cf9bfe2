"""Pairs of values that tiglon refuses, each with words of its sentence. A new refusal is a decision, made here."""

from dataclasses import dataclass

from tests.combinations.options import Choice


@dataclass(frozen=True)
class Refusal:
    """Two values that cannot stand together."""

    one: tuple[str, str]
    """(option, value)."""
    other: tuple[str, str]
    words: str
    """Part of the sentence that says so."""


def _each(one: tuple[str, tuple[str, ...]], other: tuple[str, tuple[str, ...]], words: str) -> list[Refusal]:
    return [Refusal((one[0], a), (other[0], b), words) for a in one[1] for b in other[1]]


TIED = ("half-swap", "plain", "projection", "small-init")

REFUSALS = (
    *_each(("heads", ("mla", "mla-query-latent")), ("qk norm", ("rms", "key-l2")), "cannot be used with attention = 'mla'"),
    *_each(("embedding", ("lazy",)), ("output head", TIED), "'lazy' cannot be used with model.tie_word_embeddings"),
    *_each(("embedding", ("lazy", "adamw")), ("optimizer", ("adamw",)), "is a remedy for sign optimizers"),
    *_each(("embedding rms", ("row",)), ("optimizer", ("lion", "adamw")), "scales Tiger's rate, but"),
    *_each(("embedding rms", ("row",)), ("embedding", ("adamw",)), "scales Tiger's rate, but"),
    *_each(("non-finite rule", ("shrink",)), ("optimizer", ("lion", "adamw")), "is Tiger's rule"),
    *_each(("engine", ("fold",)), ("optimizer", ("lion", "adamw")), "cannot run optimizer.name"),
    *_each(("engine", ("fold",)), ("embedding", ("adamw",)), "cannot run optimizer.embedding = 'adamw'"),
    *_each(("engine", ("fold",)), ("clipping", ("tight",)), "cannot clip"),
    *_each(("engine", ("fold",)), ("offload", ("cpu",)), "has no optimizer state to offload"),
    *_each(("engine", ("zero-3-hpz",)), ("data ranks", ("1",)), "does not divide 1 data-parallel ranks"),
)


def refused(choice: Choice) -> list[Refusal]:
    """The refusals that apply to a whole or partial choice."""

    def holds(pair: tuple[str, str]) -> bool:
        return choice.get(pair[0]) == pair[1]

    return [refusal for refusal in REFUSALS if holds(refusal.one) and holds(refusal.other)]
