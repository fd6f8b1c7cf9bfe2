"""Options together: the table is complete, the array covers it, and its configurations do as they should."""

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise

import pytest
from pydantic import BaseModel

from launch.config import RunConfig
from tests.combinations import array
from tests.combinations.__main__ import changed, make_place
from tests.combinations.check import check, check_refused
from tests.combinations.options import EXEMPT, OPTIONS, Choice, default, keys, ranks
from tests.combinations.refusals import REFUSALS, Refusal
from tests.combinations.run import Place
from tests.combinations.shrink import shrink

SLICE = 5
"""Configurations of the array that every test run checks, beside the examples."""
UNTIL = float(os.environ.get("ARRAY_UNTIL", "inf"))
"""Seconds since 1970, from which on configurations of the array are skipped."""
FIRST = int(os.environ.get("ARRAY_FIRST", "0"))
"""Where the array begins: where time is short, another number each day comes to all of it."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with ExitStack() as stack:
        yield make_place(tmp_path_factory.mktemp("combinations"), stack)


def every_key() -> set[str]:
    return set(_keys_of(RunConfig, ""))


def _keys_of(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for key, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys_of(field.annotation, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def test_every_key_is_combined_or_exempt_for_a_reason():
    combined = keys()
    assert every_key() - combined == set(EXEMPT) - combined, "say in tests/combinations/options.py what a new key does"
    assert combined | set(EXEMPT) <= every_key(), "a key that is gone"


def test_the_array_holds_every_pair_that_is_not_refused():
    rows = array.whole()
    assert not array.wanted().difference(*map(array.pairs, rows))
    assert all(set(row) == {option.name for option in OPTIONS} for row in rows)
    assert {ranks(row) for row in rows} == {1, 2, 4}


def test_refusals_are_few_and_of_values_that_exist():
    values = {(option.name, value) for option in OPTIONS for value in option.values}
    assert all(set(refusal.values) <= values for refusal in REFUSALS)
    assert len(REFUSALS) < array.possible() / 20


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: " + ".join(value for _, value in refusal.values))
def test_what_is_refused_says_so_and_leaves_nothing(place: Place, refusal: Refusal):
    choice = {**default(), **dict(refusal.values)}
    assert check_refused(choice, [refusal], place, "refused") == ""


def test_a_failing_configuration_is_shortened_to_the_options_that_matter():
    wrong = {"heads": "mqa", "engine": "zero-2"}
    long = next(choice for choice in array.drawn(1000, 0) if wrong.items() <= choice.items())
    asked: list[Choice] = []

    def fails(choice: Choice) -> bool:
        asked.append(choice)
        return wrong.items() <= choice.items()

    assert shrink(long, fails) == {**default(), **wrong}
    assert len(asked) < len(OPTIONS)


EXAMPLES = {
    "kept products of tensor-parallel ranks are reduced once": {"tensor parallel": "2", "recompute": "selective"},
    "a sample under tensor parallelism": {"tensor parallel": "2", "sample": "text", "precision": "bf16"},
    "a look between two steps of zero 3 with selective recomputation": {
        "engine": "zero-3", "recompute": "selective", "micro-batch": "1", "evaluation": "every-2",
        "attention diagnostics": "every-2",
    },
    "the same with latent attention and a sample": {
        "heads": "mla", "engine": "zero-3", "recompute": "selective", "micro-batch": "1", "evaluation": "every-2",
        "sample": "text",
    },
    "contexts that sequence parallelism cannot divide": {
        "tensor parallel": "2-sequence", "micro-batch": "1", "contexts": "short", "sample": "text",
        "attention diagnostics": "every-2",
    },
    "whole matrices between two steps of zero 3 under tensor parallelism": {
        "engine": "zero-3", "tensor parallel": "2", "spectrum diagnostics": "every-2",
    },
    "ids beyond the tokenizer are never drawn": {"vocabulary": "padded", "sample": "text", "output head": "untied"},
    "padding is no part of a row's rate": {
        "vocabulary": "multiple", "tensor parallel": "2", "embedding rms": "row", "output head": "untied",
    },
    "padding is no part of a matrix's scale": {"vocabulary": "whole-ranks", "tensor parallel": "2", "sample": "text"},
    "contexts longer than training beside the ordinary validation": {"contexts": "longer"},
    "documents that straddle the chunks of context ranks": {
        "context parallel": "2", "document mask": "on", "heads": "mla", "position": "inverse-leaky-rerope", "log n": "trained",
        "contexts": "short", "sample": "text", "attention diagnostics": "every-2", "recompute": "selective",
    },
    "rows seen and logits clipped where ranks exchange heads": {
        "context parallel": "2-heads", "heads": "mqa", "qk clip": "small", "embedding": "seen", "output head": "untied",
        "windows": "last-full", "engine": "fold",
    },
}  # fmt: skip
WIDE = {
    f"{context} context ranks x {tensor} tensor x {data} data, {engine}": {
        "context parallel": context, "tensor parallel": tensor, "data ranks": data, "engine": engine, **more,
    }
    for context, tensor, data, engine, more in (
        ("4", "1", "1", "zero-1", {"heads": "mla", "position": "leaky-rerope", "document mask": "on"}),
        ("4-heads", "1", "1", "zero-2", {"heads": "gqa", "windows": "last-full", "log n": "trained"}),
        ("4", "2-sequence", "1", "zero-1", {"heads": "mqa", "position": "rerope", "log n": "inference"}),
        ("4", "1", "2", "zero-3", {"heads": "gqa", "windows": "all", "micro-batch": "1"}),
        ("2", "2", "2", "zero-2", {"heads": "mla", "recompute": "selective", "document mask": "on"}),
        ("2-heads", "2", "2", "zero-3-hpz", {"heads": "mqa", "position": "yarn"}),
        ("2", "2-sequence", "2", "fold", {"heads": "gqa", "position": "inverse-leaky-rerope", "qk clip": "on"}),
    )
} | {
    "four stages": {"pipeline parallel": "4", "recompute": "full", "sample": "text", "optimizer": "muon"},
    "four ranks of two stages": {"pipeline parallel": "4-interleaved", "precision": "bf16", "document mask": "on"},
    "four stages under fold": {"pipeline parallel": "4", "engine": "fold", "clipping": "off", "output head": "untied"},
    "stages, tensor and sequence parallel, two replicas": {
        "pipeline parallel": "2-interleaved", "tensor parallel": "2-sequence", "data ranks": "2", "precision": "bf16",
        "engine": "zero-2", "optimizer": "adamw", "clipping": "tight",
    },
    "stages and sequences shared": {
        "pipeline parallel": "2", "context parallel": "4", "heads": "mla", "contexts": "long", "evaluation": "every-2",
        "attention diagnostics": "every-2", "spectrum diagnostics": "every-2", "replica check": "every-2",
    },
}  # fmt: skip
"""More ranks than the array has."""


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(place: Place, name: str):
    assert check({**default(), **EXAMPLES[name]}, place, "example") == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", WIDE)
def test_wide_example(place: Place, name: str):
    assert check({**default(), **WIDE[name]}, place, "wide") == ""


@pytest.mark.slow
def test_another_map_read_between_two_compiled_steps(place: Place):
    """It had compiled blocks compiled again, for more general inputs, and training continued with that code."""
    values = {
        "heads": "mqa", "head width": "own", "qk norm": "rms", "windows": "last-full-unrotated", "output head": "plain",
        "position": "ntk-mixed-075", "theta": "small", "log n": "inference", "corpora": "mixture", "micro-batch": "1",
        "precision": "bf16", "compile": "on", "tensor parallel": "2-sequence", "engine": "zero-3", "bucket": "small",
        "evaluation": "every-2", "evaluate with": "ntk",
    }  # fmt: skip
    assert check({**default(), **values}, place, "between") == ""


@pytest.mark.slow
def test_documents_whose_number_varies_in_compiled_code(place: Place):
    """The first batch compiled code for its own number of documents, and a resumed run compiled it for another batch's."""
    values = {
        "heads": "gqa", "qk norm": "key-l2", "windows": "last-full-unrotated", "output head": "projection",
        "corpora": "mixture", "document mask": "on", "optimizer": "lion", "embedding": "adamw", "precision": "bf16",
        "compile": "on", "recompute": "selective", "tensor parallel": "2-sequence",
    }  # fmt: skip
    assert check({**default(), **values}, place, "vary") == ""


@pytest.mark.slow
def test_layers_of_both_kinds_in_code_compiled_piecewise(place: Place):
    """From the first unrotated layer on, the others were rotated uncompiled: all but the first micro-batch had other bits."""
    values = {
        "windows": "last-full-unrotated", "document mask": "off", "precision": "bf16", "compile": "on", "engine": "zero-3",
    }  # fmt: skip
    assert check({**default(), **values}, place, "pieces") == ""


@pytest.mark.parametrize("number", range(SLICE))
def test_slice_of_the_array(place: Place, number: int):
    quick = [row for row in array.whole() if not array.is_slow(row) and ranks(row) < 4]
    assert check(quick[number * len(quick) // SLICE], place, "slice") == ""


def test_every_configuration_of_the_array_has_its_turn():
    size, days = len(array.whole()), [array.in_order(day) for day in range(365, 370)]
    assert all(sorted(day) == list(range(size)) for day in days)
    part = size * 2 // 5 + 2
    for three in zip(days, days[1:], days[2:], strict=False):
        assert set().union(*(day[:part] for day in three)) == set(range(size))
    slow = [array.is_slow(array.whole()[number]) for number in days[0]]
    assert abs(sum(slow[:part]) / sum(slow) - part / size) < 0.1


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("number", array.in_order(FIRST))
def test_whole_array(place: Place, number: int):
    if time.time() > UNTIL:
        pytest.skip("no time left (ARRAY_UNTIL)")
    assert check(array.whole()[number], place, "whole") == ""


def test_random_configurations_are_legal_and_differ():
    drawn = list(array.drawn(20, 7))
    assert drawn == list(array.drawn(20, 7)) and all(one != other for one, other in pairwise(drawn))


def test_values_are_chosen_by_name():
    assert changed(["tensor parallel=2", "recompute=full"]) == {**default(), "tensor parallel": "2", "recompute": "full"}
    with pytest.raises(ValueError, match="names no option; legal: heads, "):
        changed(["tensor=2"])
    with pytest.raises(ValueError, match="names no value of 'precision'; legal: fp32, bf16"):
        changed(["precision=fp16"])
