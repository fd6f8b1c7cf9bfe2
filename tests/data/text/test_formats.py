import dataclasses
import json

import pytest

from data.text.formats import LONGEST_DOCUMENT, RejectedDocuments, TextFormat, left_out_remark, means


@pytest.mark.parametrize(
    ("files", "address", "meant"),
    [
        ("a.jsonl", "/work/a.jsonl", True),
        ("./a.jsonl", "/work/a.jsonl", True),
        ("/work/a.jsonl", "/work/a.jsonl", True),
        ("a.jsonl", "/work/b/a.jsonl", True),  # a name alone is a pattern of names
        ("./a.jsonl", "/work/b/a.jsonl", False),
        ("b", "/work/b/a.jsonl", True),
        ("b/", "/work/b/c/a.jsonl", True),
        ("b", "/work/bc/a.jsonl", False),
        ("b", "/other/b/a.jsonl", False),
        ("*.jsonl", "/other/b/a.jsonl", True),
        ("b/*.jsonl", "/work/b/a.jsonl", True),
        ("b/*.jsonl", "/work/c/a.jsonl", False),
        ("b/**/*.jsonl", "/work/b/a.jsonl", True),
        ("b/**/*.jsonl", "/work/b/c/d/a.jsonl", True),
        ("b/**/*.jsonl", "/work/c/a.jsonl", False),
        ("s3://bucket/**/a.jsonl", "s3://bucket/a.jsonl?region=x", True),
        ("s3://bucket/b", "s3://bucket/b/a.jsonl?region=x", True),
        ("s3://bucket/b/*.jsonl", "s3://bucket/b/a.jsonl?region=x", True),
        ("s3://bucket/b", "s3://bucket/c/a.jsonl", False),
        ("*.jsonl", "s3://bucket/c/a.jsonl?region=x", True),
        ("../work/a.jsonl", "/work/a.jsonl", True),
        ("../other/./b", "/other/b/a.jsonl", True),
        ("../other/*.jsonl", "/other/b.jsonl", True),
        ("../other/*.jsonl", "/work/b.jsonl", False),
        ("~/a.jsonl", "/home/me/a.jsonl", True),
        ("~/../you/*.jsonl", "/home/you/a.jsonl", True),
    ],
)
def test_which_files_are_meant(monkeypatch, files, address, meant):
    monkeypatch.setattr("os.getcwd", lambda: "/work")
    monkeypatch.setenv("HOME", "/home/me")
    assert means(files, address) == meant


def test_the_first_that_means_a_file_names_its_field():
    text_format = TextFormat("text", fields=(("*.jsonl", "body"), ("*", "raw")))
    assert [text_format.field_of(f"/x/{name}") for name in ("a.jsonl", "a.parquet")] == ["body", "raw"]
    assert TextFormat("content").field_of("/x/a.jsonl") == "content"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"encoding": "utf-99"}, "--encoding 'utf-99' names no encoding"),
        ({"encoding": "base64"}, "names no encoding"),
        ({"encoding": ""}, "names no encoding"),
        ({"max_document_bytes": 0}, "at least 1 byte"),
        ({"max_document_bytes": -1}, "at least 1 byte"),
        ({"max_document_bytes": LONGEST_DOCUMENT + 1}, f"at most {LONGEST_DOCUMENT}"),
        ({"max_document_bytes": 10**23}, f"at most {LONGEST_DOCUMENT}"),
        ({"field": ""}, "--field is empty"),
        ({"fields": (("a.jsonl", ""),)}, "--field is empty"),
        ({"fields": (("", "body"),)}, "--field '=body' is for no file: write FILES=body"),
    ],
)
def test_values_that_nothing_can_be_read_with_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        TextFormat(**options).check()


def test_a_plan_of_an_earlier_version_is_the_same_until_a_new_option_is_used():
    """plan.json of 0.1.0 has these keys; with more, a preparation begun then could not be resumed."""
    assert TextFormat().record() == {
        "field": "text", "text_documents": "file", "on_error": "stop", "max_document_bytes": 64 << 20
    }  # fmt: skip
    for option in dataclasses.fields(TextFormat):
        other = {"encoding": "utf-16", "fields": (("a", "b"),), "max_document_bytes": 1}.get(option.name, "line")
        assert json.dumps(TextFormat(**{option.name: other}).record()) != json.dumps(TextFormat().record())


def test_a_plan_has_one_spelling_of_the_files_of_a_field(monkeypatch):
    monkeypatch.setattr("os.getcwd", lambda: "/work")
    spelled = [TextFormat(fields=((files, "body"),)).record()["fields"] for files in ("./b/*.jsonl", "../work/b/*.jsonl")]
    assert spelled == [(("/work/b/*.jsonl", "body"),)] * 2
    as_written = (("*.jsonl", "a"), ("s3://b/c", "b"))  # a pattern of names; an object store
    assert TextFormat(fields=as_written).record()["fields"] == as_written


def test_rejected_documents_are_counted_or_end_the_command():
    skipping = RejectedDocuments("skip")
    for _ in range(1200):
        skipping.add("broken JSON", "a.jsonl byte 7", "repair it")
    skipping.counts["empty"] += 1
    assert left_out_remark(skipping.counts) == "documents left out: 1,200 broken JSON, 1 empty"
    assert left_out_remark({}) == left_out_remark({"empty": 0}) == ""
    with pytest.raises(ValueError, match=r"a\.jsonl byte 7: broken JSON; repair it, or .* --on-error skip"):
        RejectedDocuments().add("broken JSON", "a.jsonl byte 7", "repair it")
