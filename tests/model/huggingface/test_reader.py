"""A stranger's config.json: what is asked of it, and what is said when it answers something else."""

import re
from collections.abc import Callable
from typing import Any

import pytest

from model.huggingface.reader import LARGEST_SIZE, ConfigReader

VALUES = {"width": 64, "eps": 1e-5, "flag": True, "word": "silu", "nothing": None, "inner": {"factor": 2}, "list": [1, 2, 3]}


def reader(**changes: Any) -> ConfigReader:
    return ConfigReader({**VALUES, **changes}, {"missing": 7}, "config.json")


def test_what_is_there_is_read_and_what_is_not_has_its_default():
    config = reader()
    assert (config.size("width"), config.number("eps"), config.flag("flag")) == (64, 1e-5, True)
    assert (config.choice("word", ["gelu", "silu"]), config.entries("list", 3)) == ("silu", [1, 2, 3])
    assert (config.size("missing"), config.optional_size("nothing"), config.optional_number("absent")) == (7, None, None)
    assert config.entries("list", 2, or_more=True) == [1, 2]
    inner = config.object("inner")
    assert inner is not None and inner.number("factor") == 2.0 and config.object("nothing") is None
    inner.finish()
    config.finish()


REFUSED: list[tuple[dict[str, Any], Callable[[ConfigReader], Any], str]] = [
    ({"width": "64"}, lambda config: config.size("width"), "config.json: width = '64' is no whole number; correct it"),
    ({"width": True}, lambda config: config.size("width"), "width = True is no whole number"),
    ({"width": 64.0}, lambda config: config.size("width"), "width = 64.0 is no whole number"),
    ({"width": 0}, lambda config: config.size("width"), f"width = 0 must lie between 1 and {LARGEST_SIZE}"),
    ({"width": 10**30}, lambda config: config.size("width"), f"must lie between 1 and {LARGEST_SIZE}"),
    ({"width": None}, lambda config: config.size("width"), "config.json: width is missing or null; add it, as the model was"),
    ({"eps": float("nan")}, lambda config: config.number("eps"), "eps = nan must be above 0 and finite"),
    ({"eps": -1}, lambda config: config.number("eps"), "eps = -1 must be above 0 and finite"),
    ({"eps": [1]}, lambda config: config.number("eps"), "eps = [1] is no number"),
    ({"flag": 1}, lambda config: config.flag("flag"), "flag = 1 must be true or false"),
    ({"word": "gelu"}, lambda config: config.choice("word", ["silu"]), "word = 'gelu' is nothing that tiglon computes"),
    ({"word": {}}, lambda config: config.choice("word", ["silu"]), "word = {} is nothing that tiglon computes here"),
    ({"width": 1}, lambda config: config.only("width", None, False), "width = 1 is nothing that tiglon computes here"),
    ({"inner": 3}, lambda config: config.object("inner"), "inner = 3 must be an object of keys and values, or null"),
    ({"list": [1]}, lambda config: config.entries("list", 2), "entry for each layer (num_hidden_layers = 2)"),
    ({}, lambda config: config.object("inner").finish(), "inner.factor = 2 is not known to tiglon"),
    ({"list": [0] * 99}, lambda config: config.entries("list", 100), " ... must be null"),
]  # fmt: skip


@pytest.mark.parametrize("changes, ask, sentence", REFUSED)
def test_anything_else_is_refused_by_its_name(changes: dict[str, Any], ask: Callable[[ConfigReader], Any], sentence: str):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        ask(reader(**changes))


def test_a_key_that_nobody_read_is_refused_unless_it_is_harmless():
    config = reader()
    for key in VALUES.keys() - {"word"}:
        config.take(key)
    with pytest.raises(ValueError, match=r"word = 'silu' is not known to tiglon: .*import with --ignore word\)"):
        config.finish()
    config.finish({"word"})


def test_true_is_not_one():
    with pytest.raises(ValueError, match="flag = True"):
        reader().only("flag", 1)
