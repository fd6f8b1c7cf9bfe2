import json
import random
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import storage
from data.corpus.shards import Corpus
from data.ingest.prepare import PrepareOptions, prepare
from data.text.formats import TextFormat
from data.tokenizer.tokenizer import SEGMENT_CHARACTERS, Tokenizer
from data.tokenizer.train import train_tokenizer

HARD = [
    "", " ", "  a  b   ", "\t\tx\n\n  y\r\n", "\x00\x01\x7f", "\u2581 x\u2581\u2581 ", "你好，世界😀",
    "<s></s><|end_of_text|><unk><0x41>", " \u2047 ", "\ufeffabc", "é e\u0301", "\u2028\u2029\x85\u00a0",
    "    def f(self):\n        return 12345\n", "\u2585\ufffd", "👩\u200d👩\u200d👧🇩🇪",
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tokenizer_directory):
    return Tokenizer.load(tokenizer_directory)


@pytest.mark.parametrize("text", HARD)
def test_hard_text_survives(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_unicode_survives(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_hundred_thousand_lines_survive_or_are_counted(tmp_path, tokenizer, tokenizer_directory):
    """Broken surrogates arrive as bytes that are no UTF-8; everything else comes back from the shards letter for letter."""
    draw = random.Random(1)
    alphabet = [*"abcdefgh XYZ.,;(){}_=0123456789\t\r\x00\x01\x1b数据模型语言训练😀🎉👩\u2581\u2028\ud800"]
    lines = ["x" + "".join(draw.choices(alphabet, k=draw.randint(0, 40))) for _ in range(100_000)]
    raw = pa.array([line.encode("utf-8", "surrogatepass") for line in lines], pa.binary())
    pq.write_table(pa.table({"text": raw}), tmp_path / "x.parquet")
    reading = TextFormat(on_error="skip")
    prepared = prepare(
        [str(tmp_path / "x.parquet")],
        tokenizer_directory,
        str(tmp_path / "out"),
        PrepareOptions(validation_fraction=0, text_format=reading),
        workers=1,
    )
    kept = [line for line in lines if "\ud800" not in line]
    counts = prepared.manifests["train"].counts
    assert counts["documents"] == len(kept) and counts["left_out"] == {"invalid UTF-8": len(lines) - len(kept)}
    corpus = Corpus(str(tmp_path / "out" / "train"))
    documents = np.split(
        corpus.read(0, corpus.tokens), np.flatnonzero(corpus.read(0, corpus.tokens) == tokenizer.end_of_text) + 1
    )
    assert [tokenizer.decode(document) for document in documents[:-1]] == kept


def test_a_lone_surrogate_is_refused(tokenizer):
    for text in ("\ud800", "a\udfffb" * 9000, "\u2581\udc00"):
        with pytest.raises(ValueError, match="lone surrogate"):
            tokenizer.encode(text)


@pytest.mark.parametrize("model", ["unigram", "bpe"])
def test_segments_are_as_good_as_the_whole(tmp_path, corpus_jsonl, documents, model):
    tokenizer = train_tokenizer([corpus_jsonl], str(tmp_path), vocab_size=350, model=model)
    pieces, text = tokenizer.backend.pieces, "\n".join(documents)
    assert len(text) > 3 * SEGMENT_CHARACTERS
    ours, whole = tokenizer.encode_array(text).tolist(), pieces.encode(text)
    assert ours == tokenizer.encode(text)
    assert [ours.count(1), ours.count(2)] == [whole.count(1), whole.count(2)]
    assert ours == whole
    assert tokenizer.decode(ours) == text
    long_line = "x 你\u2581" * SEGMENT_CHARACTERS
    assert tokenizer.decode(tokenizer.encode(long_line)) == long_line


def test_separator_is_no_text(tokenizer):
    assert tokenizer.end_of_text not in tokenizer.encode("<|end_of_text|>")
    assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.end_of_text, *np.array(tokenizer.encode("b"))]) == "ab"


def test_directories_that_hold_no_tokenizer_are_refused(tmp_path, tokenizer_directory):
    with pytest.raises(FileNotFoundError, match="tokenizer train"):
        Tokenizer.load(str(tmp_path / "nowhere"))
    Tokenizer.load(tokenizer_directory).save(str(tmp_path))
    described = json.loads((tmp_path / "tiglon_tokenizer.json").read_text())
    (tmp_path / "tiglon_tokenizer.json").write_text(json.dumps({**described, "fingerprint": "0" * 64}))
    with pytest.raises(ValueError, match="not the one"):
        Tokenizer.load(str(tmp_path))


@pytest.mark.parametrize("held", ["tokenizer.model", "tiglon_tokenizer.json"])
@pytest.mark.parametrize("content", [b"", b"of another library", None])
def test_a_tokenizer_is_never_replaced_by_another(tmp_path, tokenizer, held, content):
    """Shards that were made with the one that is there could not be used any more."""
    tokenizer.save(str(tmp_path))
    there = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / held).write_bytes(there[held] + b" " if content is None else content)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(
        ValueError, match=rf"'{tmp_path}' holds another {held}, which would be replaced: choose another --output"
    ):
        tokenizer.save(str(tmp_path))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_very_same_tokenizer_may_be_written_again(tmp_path, tokenizer):
    (tmp_path / "README.md").write_text("mine")
    for left in ("all of it", "tokenizer.model", "tiglon_tokenizer.json"):  # as a killed program leaves it
        tokenizer.save(str(tmp_path))
        for path in tmp_path.glob("t*"):
            if left not in ("all of it", path.name):
                path.unlink()
        tokenizer.save(str(tmp_path))
        assert Tokenizer.load(str(tmp_path)).description == tokenizer.description
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.parametrize("had", [False, True])
@pytest.mark.parametrize("error", [OSError(28, "full"), KeyboardInterrupt()])
def test_a_tokenizer_that_cannot_be_written_leaves_nothing(tmp_path, tokenizer, monkeypatch, error, had):
    write = storage.write_atomic
    if had:
        write(f"{tmp_path}/tokenizer.model", tokenizer.model)

    def failing(address, content):
        if address.endswith("tiglon_tokenizer.json"):
            raise error
        write(address, content)

    monkeypatch.setattr("data.storage.write_atomic", failing)
    with pytest.raises(type(error)):
        tokenizer.save(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == (["tokenizer.model"] if had else [])


def test_a_description_of_an_earlier_version_has_no_beginning(tmp_path, tokenizer):
    tokenizer.save(str(tmp_path))
    described = json.loads((tmp_path / "tiglon_tokenizer.json").read_text())
    names = ("kind", "model", "fingerprint", "vocab_size", "end_of_text", "lossless")
    (tmp_path / "tiglon_tokenizer.json").write_text(json.dumps({name: described[name] for name in names}))
    again = Tokenizer.load(str(tmp_path))
    assert again.description == tokenizer.description and again.end_tokens == (again.end_of_text,)
    assert again.prompt("a") == [again.end_of_text, *again.encode("a")]
    (tmp_path / "tiglon_tokenizer.json").write_text(json.dumps({**described, "begin_of_text": 5}))
    with pytest.raises(ValueError, match="not the one"):  # the fingerprint is of documents without a beginning
        Tokenizer.load(str(tmp_path))
    (tmp_path / "tiglon_tokenizer.json").write_text("[]")
    with pytest.raises(ValueError, match="describes no tokenizer"):
        Tokenizer.load(str(tmp_path))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("kind", "../../etc/passwd"), ("kind", "/x"), ("kind", ["sentencepiece"]), ("kind", {}), ("vocab_size", "400"),
        ("vocab_size", -1), ("vocab_size", 1 << 40), ("vocab_size", 400.0), ("vocab_size", True), ("end_of_text", 1 << 20),
        ("end_of_text", -1), ("end_of_text", None), ("fingerprint", 7), ("lossless", "yes"), ("model", 7), ("unknown", 1),
    ],
)  # fmt: skip
def test_a_strangers_description_is_one_sentence(tokenizer_directory, tmp_path, key, value):
    for file in ("tokenizer.model", "tiglon_tokenizer.json"):
        shutil.copy(f"{tokenizer_directory}/{file}", tmp_path)
    assert Tokenizer.load(str(tmp_path)).has_scores
    description = json.loads((tmp_path / "tiglon_tokenizer.json").read_text())
    (tmp_path / "tiglon_tokenizer.json").write_text(json.dumps(description | {key: value}))
    with pytest.raises(ValueError, match="describes no tokenizer of this version"):
        Tokenizer.load(str(tmp_path))
    (tmp_path / "tiglon_tokenizer.json").write_text("[" * 200_000)
    with pytest.raises(ValueError, match="nests more deeply"):
        Tokenizer.load(str(tmp_path))
