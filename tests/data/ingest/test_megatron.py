import struct

import numpy as np
import pytest

from data.corpus.audit import audit_corpus
from data.corpus.shards import Corpus
from data.ingest.megatron import MAGIC, import_megatron, open_megatron
from data.storage import only_writer
from data.tokenizer.tokenizer import Tokenizer


def write_megatron(prefix, documents, dtype, code, sequences_a_document=1):
    """The format of megatron.core.datasets.indexed_dataset, written by hand."""
    sequences = [part for document in documents for part in np.array_split(document, sequences_a_document)]
    np.concatenate(documents).astype(dtype).tofile(f"{prefix}.bin")
    lengths = np.array([len(sequence) for sequence in sequences], np.int32)
    pointers = (np.cumsum(lengths, dtype=np.int64) - lengths) * np.dtype(dtype).itemsize
    bounds = np.arange(len(documents) + 1, dtype=np.int64) * sequences_a_document
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sequences), len(bounds))
    with open(f"{prefix}.idx", "wb") as file:
        file.write(head + lengths.tobytes() + pointers.tobytes() + bounds.tobytes())


@pytest.mark.parametrize(("dtype", "code", "parts"), [("<u2", 8, 1), ("<i4", 4, 3)])
def test_megatron_dataset(tmp_path, tokenizer_directory, documents, dtype, code, parts):
    tokenizer = Tokenizer.load(tokenizer_directory)
    tokens = [np.array(tokenizer.encode(text)) for text in documents[:60]]
    tokens[::2] = [np.append(document, tokenizer.end_of_text) for document in tokens[::2]]
    write_megatron(tmp_path / "x", tokens, dtype, code, parts)
    manifests = import_megatron(str(tmp_path / "x"), tokenizer_directory, str(tmp_path / "out"), 0.3, shard_tokens=5000)
    parts_of = [Corpus(str(tmp_path / "out" / part)) for part in ("train", "validation")]
    text = "".join(tokenizer.decode(corpus.read(0, corpus.tokens)) for corpus in parts_of)
    assert sorted(text) == sorted("".join(documents[:60]))
    assert sum(corpus.tokens for corpus in parts_of) == sum(map(len, tokens)) + 30
    assert len(manifests["train"].shards) > 1 and manifests["validation"].counts["documents"] > 0
    assert not any(audit_corpus(corpus.directory).faults for corpus in parts_of)
    with pytest.raises(ValueError, match="not empty"):
        import_megatron(str(tmp_path / "x"), tokenizer_directory, str(tmp_path / "out"))
    with only_writer(str(tmp_path / "new"), "--output"), pytest.raises(ValueError, match="written by another command"):
        import_megatron(str(tmp_path / "x"), tokenizer_directory, str(tmp_path / "new"))


def test_megatrons_own_writer_is_understood(tmp_path):
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    import torch

    builder = indexed.IndexedDatasetBuilder(str(tmp_path / "x.bin"), dtype=np.uint16)
    documents = [np.arange(1, 50), np.arange(7), np.arange(300, 310)]
    for document in documents:
        builder.add_document(torch.from_numpy(document), [len(document)])
    builder.finalize(str(tmp_path / "x.idx"))
    found = open_megatron(str(tmp_path / "x"))
    assert [found.tokens[a : a + n].tolist() for a, n in zip(found.starts, found.lengths)] == [d.tolist() for d in documents]


@pytest.mark.parametrize("empty", ["first", "middle", "last", "two last"])
@pytest.mark.parametrize("separator", [False, True])
def test_empty_documents_are_left_out_and_counted(tmp_path, tokenizer_directory, empty, separator):
    """Of no sequence at all, as Megatron's own writer makes them, or of a separator alone."""
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    import torch

    end = Tokenizer.load(tokenizer_directory).end_of_text
    nothing: list[list[int]] = [[end]] if separator else [[]]
    full = [[40, 41, 42], [50], [60, 61]]
    at = {"first": 0, "middle": 1}.get(empty, 3)
    documents = full[:at] + nothing * (2 if empty == "two last" else 1) + full[at:]
    builder = indexed.IndexedDatasetBuilder(str(tmp_path / "x.bin"), dtype=np.uint16)
    for document in documents:
        builder.add_document(torch.tensor(document, dtype=torch.int64), [len(document)] if document else [])
    builder.finalize(str(tmp_path / "x.idx"))
    found = open_megatron(str(tmp_path / "x"))
    assert [found.tokens[a : a + n].tolist() for a, n in zip(found.starts, found.lengths)] == documents
    manifest = import_megatron(str(tmp_path / "x"), tokenizer_directory, str(tmp_path / "out"), 0)["train"]
    assert manifest.counts["documents"] == 3 and manifest.counts["left_out"] == {"empty": len(documents) - 3}
    corpus = Corpus(str(tmp_path / "out" / "train"))
    assert corpus.read(0, corpus.tokens).tolist() == [token for document in full for token in (*document, end)]


@pytest.mark.parametrize("share", [-1, 1, 2, float("nan"), float("inf")])
def test_a_share_that_is_none_is_refused_before_anything_is_read(tmp_path, share):
    """2 put every document into validation."""
    with pytest.raises(ValueError, match=f"validation_fraction = {share}: give a share of at least 0 and below 1"):
        import_megatron("nowhere", "nowhere", str(tmp_path / "out"), share)


@pytest.mark.parametrize(("dtype", "code", "extra"), [("<u2", 8, 1), ("<i4", 4, 1), ("<i4", 4, 2), ("<i8", 5, 7)])
def test_a_bin_that_ends_inside_a_token_is_refused(tmp_path, dtype, code, extra):
    write_megatron(tmp_path / "x", [np.arange(5), np.arange(3)], dtype, code)
    with open(tmp_path / "x.bin", "ab") as file:
        file.write(bytes(extra))
    width = np.dtype(dtype).itemsize
    with pytest.raises(ValueError, match=rf"x\.bin' has {8 * width + extra} bytes, no multiple of the {width} of a token"):
        open_megatron(str(tmp_path / "x"))


def test_a_dataset_of_empty_documents_is_refused(tmp_path, tokenizer_directory):
    write_megatron(tmp_path / "x", [np.empty(0, int), np.empty(0, int)], "<u2", 8)
    with pytest.raises(ValueError, match=r"holds no document with tokens \(2 empty ones\)"):
        import_megatron(str(tmp_path / "x"), tokenizer_directory, str(tmp_path / "out"))
    assert not (tmp_path / "out" / "train").exists()


def test_wrong_megatron_files_are_refused(tmp_path, corpus_jsonl, tokenizer_directory):
    with pytest.raises(FileNotFoundError, match=r"pair of \.bin and \.idx"):
        open_megatron(str(tmp_path / "x"))
    write_megatron(tmp_path / "x", [np.arange(5), np.array([7, 60_000])], "<u2", 8)
    with pytest.raises(ValueError, match="holds token 60000"):
        import_megatron(str(tmp_path / "x"), tokenizer_directory, str(tmp_path / "out"), 0)
    index = (tmp_path / "x.idx").read_bytes()
    for cut, message in ((index[:20], "not a Megatron index"), (index[:-3], "cut short")):
        (tmp_path / "x.idx").write_bytes(cut)
        with pytest.raises(ValueError, match=message):
            open_megatron(str(tmp_path / "x"))
    (tmp_path / "x.idx").write_bytes(index)
    (tmp_path / "x.bin").write_bytes(b"\0\0")
    with pytest.raises(ValueError, match=r"needs a \.bin of more than the 2 bytes"):
        open_megatron(str(tmp_path / "x"))


@pytest.mark.parametrize(
    ("lengths", "pointers", "bounds", "words"),
    [
        ([3, -1], [0, 6], [0, 1, 2], "negative length"),
        ([3, 2], [0, -6], [0, 1, 2], "begins before"),
        ([3, 1], [1, 7], [0, 1, 2], "inside a token"),
        ([3, 2], [0, 1 << 62], [0, 1, 2], "needs a .bin of more"),
        ([3, 1 << 30], [0, 6], [0, 1, 2], "needs a .bin of more"),
        ([1 << 30, 2], [0, 6], [0, 1, 2], "needs a .bin of more"),
        ([3, 2], [4, 0], [0, 1, 2], "do not follow one another"),
        ([3, 2], [0, 0], [0, 1, 2], "do not follow one another"),
        ([3, 2], [0, 6], [0, 2, 1], "out of order"),
        ([3, 2], [0, 6], [-1, 1, 2], "out of order"),
        ([3, 2], [0, 6], [0, 1, 3], "beyond its 2 sequences"),
        ([3, 2], [0, 6], [0, 1, 1 << 62], "beyond its 2 sequences"),
        ([3, 2], [0, 6], [1, 2], "documents for 1 of its 2 sequences"),  # Megatron's own samples are of all sequences
        ([3, 2], [0, 6], [0, 1], "documents for 1 of its 2 sequences"),  # its reader fails here
        ([3, 2], [0, 6], [0], "documents for 0 of its 2 sequences"),
        ([3, 2], [0, 6], [], "documents for 0 of its 2 sequences"),
        ([1, 1, 1, 1, 1], [0, 2, 4, 6, 8], [1, 3, 4], "documents for 3 of its 5 sequences"),
        ([3, 1], [0, 6], [0, 1, 2], "sequences for 8 of the 10 bytes of its .bin"),  # text behind the last one
        ([3, 1], [2, 8], [0, 1, 2], "sequences for 8 of the 10 bytes of its .bin"),  # and before the first
        ([], [], [0], "sequences for 0 of the 10 bytes of its .bin"),
    ],
)
def test_an_index_that_leads_elsewhere_is_refused(tmp_path, lengths, pointers, bounds, words):
    (tmp_path / "x.bin").write_bytes(bytes(10))
    head = MAGIC + struct.pack("<QBQQ", 1, 8, len(lengths), len(bounds))
    arrays = (np.array(lengths, np.int32), np.array(pointers, np.int64), np.array(bounds, np.int64))
    (tmp_path / "x.idx").write_bytes(head + b"".join(array.tobytes() for array in arrays))
    with pytest.raises(ValueError, match=words):
        open_megatron(str(tmp_path / "x"))


@pytest.mark.parametrize("counts", [(1 << 63, 1), (2, 1 << 63), ((1 << 64) - 1, (1 << 64) - 1)])
def test_counts_beyond_the_index_take_no_memory(tmp_path, counts):
    (tmp_path / "x.bin").write_bytes(bytes(10))
    (tmp_path / "x.idx").write_bytes(MAGIC + struct.pack("<QBQQ", 1, 8, *counts) + bytes(100))
    with pytest.raises(ValueError, match="cut short"):
        open_megatron(str(tmp_path / "x"))
