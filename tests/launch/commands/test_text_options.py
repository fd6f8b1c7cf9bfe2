"""The options offer what the reader of text knows, no more and no less."""

from enum import StrEnum
from typing import Any, get_args

import pytest

from data.text.formats import OnError, TextDocuments
from launch.commands.text_options import OnErrorChoice, TextDocumentsChoice, text_format


@pytest.mark.parametrize(("offered", "known"), [(TextDocumentsChoice, TextDocuments), (OnErrorChoice, OnError)])
def test_every_choice_is_known_and_every_known_one_is_offered(offered: type[StrEnum], known: Any):
    assert {choice.value for choice in offered} == set(get_args(known))


@pytest.mark.parametrize(
    ("values", "field", "fields"),
    [
        (None, "text", ()),
        (["body"], "body", ()),
        (["content.body", "web/*=raw"], "content.body", (("web/*", "raw"),)),
        (["a.jsonl=one", "b=two"], "text", (("a.jsonl", "one"), ("b", "two"))),
        (["s3://b/x?region=eu=raw"], "text", (("s3://b/x?region=eu", "raw"),)),
    ],
)
def test_the_field_of_all_and_of_some(values: Any, field: str, fields: Any):
    found = text_format(values, TextDocumentsChoice.file, OnErrorChoice.stop, 100, "utf-8")
    assert (found.field, found.fields, found.max_document_bytes) == (field, fields, 100)


@pytest.mark.parametrize(
    ("values", "encoding", "words"),
    [
        (["a", "b"], "utf-8", "given as a and as b"),
        (["a", ""], "utf-8", "given as"),
        (["x="], "utf-8", "is empty"),
        ([""], "utf-8", "is empty"),
        (["", "x=y"], "utf-8", "is empty"),
        (["=y"], "utf-8", "is for no file"),
        (None, "hex", "encoding"),
    ],
)
def test_options_that_contradict_are_refused(values: Any, encoding: str, words: str):
    with pytest.raises(ValueError, match=words):
        text_format(values, TextDocumentsChoice.file, OnErrorChoice.stop, 100, encoding)
