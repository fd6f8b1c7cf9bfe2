"""Packed documents: lists of far queries and keys against every pair, and the mark for torch.compile."""

from itertools import pairwise

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from model.positions import packing
from model.positions.packing import document_of_tokens, documents_before, documents_between, mark_length_dynamic, pack_documents
from tests.model.libraries import relied_on

BOUNDARIES = [0, 3, 4, 11, 16]
ROWS = [0, 3, 4, 8, 13, 16]


def test_document_of_tokens():
    document = document_of_tokens(torch.tensor(BOUNDARIES), 16)
    assert document.tolist() == [0] * 3 + [1] + [2] * 7 + [3] * 5


@pytest.mark.parametrize("window", [1, 2, 4, 7])
def test_far_lists_hold_the_far_pairs_document_by_document(window: int):
    packed = pack_documents(torch.tensor(BOUNDARIES), window, lists=True)
    assert packed.far_queries is not None and packed.far_keys is not None and packed.far_boundaries is not None
    spans = list(pairwise(BOUNDARIES))
    pairs = [[(i, j) for i in range(a, b) for j in range(a, i + 1) if i - j >= window] for a, b in spans]
    assert packed.far_queries.tolist() == [i for document in pairs for i in sorted({i for i, _ in document})]
    assert packed.far_keys.tolist() == [j for document in pairs for j in sorted({j for _, j in document})]
    lengths = [len({i for i, _ in document}) for document in pairs]
    assert packed.far_boundaries.diff().tolist() == lengths
    assert packed.far_boundaries.dtype == packed.boundaries.dtype == torch.int32


@pytest.mark.parametrize("window", [1, 2, 4, 7])
@pytest.mark.parametrize("queries", [1, 2, 5, 7, 8])
def test_the_last_tokens_of_rows_are_queries(queries: int, window: int):
    """Of two rows of 8 tokens: boundaries and far lists against every pair."""
    spans = list(pairwise(ROWS))
    packed = pack_documents(torch.tensor(ROWS), window, lists=True, keys=8, queries=queries)
    number = {}  # of each query among the queries, by its token
    for token in range(16):
        if token % 8 >= 8 - queries:
            number[token] = len(number)
    assert packed.query_boundaries.diff().tolist() == [sum(i in number for i in range(a, b)) for a, b in spans]
    pairs = [[(i, j) for i in range(a, b) for j in range(a, i + 1) if i in number and i - j >= window] for a, b in spans]
    assert packed.far_queries is not None and packed.far_keys is not None
    assert packed.far_boundaries is not None and packed.far_key_boundaries is not None
    far_queries, far_keys = ([sorted({pair[side] for pair in document}) for document in pairs] for side in (0, 1))
    assert packed.far_queries.tolist() == [number[i] for document in far_queries for i in document]
    assert packed.far_keys.tolist() == [j for document in far_keys for j in document]
    assert packed.far_boundaries.diff().tolist() == [len(document) for document in far_queries]
    assert packed.far_key_boundaries.diff().tolist() == [len(document) for document in far_keys]
    assert [x.dtype for x in packed.tensors()] == [torch.int32] * 2 + [torch.int64] * 2 + [torch.int32] * 2
    assert [x[0].item() for x in packed.tensors() if x.dtype == torch.int32] == [0, 0, 0, 0]


@pytest.mark.parametrize("lengths", [{}, {"keys": 8, "queries": 8}, {"keys": 8}])
def test_where_all_tokens_are_queries_their_boundaries_are_those_of_keys(
    lengths: dict[str, int], monkeypatch: pytest.MonkeyPatch
):
    packed = pack_documents(torch.tensor(ROWS), 2, lists=True, **lengths)
    copies = []
    to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *arguments, **keywords: copies.append(x) or to(x, *arguments, **keywords))
    moved = packed.to(torch.device("meta"))
    assert len(copies) == 4 and moved.boundaries.device.type == "meta"
    for documents in (packed, moved):
        assert documents.query_boundaries is documents.boundaries
        assert documents.far_key_boundaries is documents.far_boundaries is not None


def test_moved_documents_keep_their_fields():
    packed = pack_documents(torch.tensor(ROWS), 2, lists=True, keys=8, queries=3)
    moved = packed.to(torch.device("cpu"))
    assert all(torch.equal(one, other) for one, other in zip(packed.tensors(), moved.tensors(), strict=True))
    one_region = pack_documents(torch.tensor(ROWS), None, lists=True, keys=8, queries=3).to(torch.device("cpu"))
    assert len(one_region.tensors()) == 2 and one_region.far_queries is None


def test_every_field_is_marked(monkeypatch: pytest.MonkeyPatch):
    marked: list[torch.Tensor] = []
    monkeypatch.setattr(packing, "mark_length_dynamic", marked.append)
    packed = pack_documents(torch.tensor(ROWS), 2, lists=True, keys=8, queries=3)
    packed.mark_dynamic()
    fields = packed.boundaries, packed.query_boundaries, packed.far_queries, packed.far_keys, packed.far_boundaries
    assert {id(x) for x in marked} == {id(x) for x in (*fields, packed.far_key_boundaries)} and len(marked) == 6


@pytest.mark.parametrize(
    ("end", "boundaries"),
    [
        (1, [0, 1, 2]),
        (3, [0, 3, 6]),
        (4, [0, 3, 4, 8]),
        (5, [0, 3, 4, 5, 10]),
        (6, [0, 3, 4, 6, 11, 12]),
        (8, ROWS),
    ],
)
def test_documents_before_an_end(end: int, boundaries: list[int]):
    """Of two rows of 8 tokens, of which [0, 3), [3, 4), [4, 8) and [8, 13), [13, 16) are documents."""
    cut = documents_before(torch.tensor(ROWS), 8, end)
    assert cut.tolist() == boundaries and cut.dtype == torch.int32


@pytest.mark.parametrize(
    ("start", "end", "boundaries"),
    [
        (0, 8, ROWS),
        (0, 3, [0, 3, 6]),
        (2, 6, [0, 1, 2, 4, 7, 8]),
        (3, 5, [0, 1, 2, 4]),
        (5, 8, [0, 3, 6]),
        (4, 7, [0, 3, 4, 6]),
    ],
)
def test_documents_between_two_tokens(start: int, end: int, boundaries: list[int]):
    """The same two rows; a document that began before `start` begins there."""
    cut = documents_between(torch.tensor(ROWS), 8, start, end)
    assert cut.tolist() == boundaries and cut.dtype == torch.int32


def test_no_lists_without_a_window_or_a_need():
    assert pack_documents(torch.tensor(BOUNDARIES), None, lists=True).far_queries is None
    assert pack_documents(torch.tensor(BOUNDARIES), 2, lists=False).far_queries is None


def marked_lengths_share_one_graph() -> None:
    with relied_on("torch", "torch._dynamo.maybe_mark_dynamic", "model.positions.packing compiles one graph for all batches"):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        compiled = torch.compile(lambda x: x * 2, backend=counter)
        for length in (5, 8):
            x = torch.arange(length)
            mark_length_dynamic(x)
            compiled(x)
        assert counter.frame_count == 1


def test_marked_lengths_share_one_graph():
    marked_lengths_share_one_graph()


@pytest.mark.parametrize("planted", [None, lambda x, dimension: None], ids=["gone", "without effect"])
def test_a_torch_that_marks_otherwise_is_seen(planted, monkeypatch: pytest.MonkeyPatch):
    if planted is None:
        monkeypatch.delattr(torch._dynamo, "maybe_mark_dynamic")
    else:
        monkeypatch.setattr(torch._dynamo, "maybe_mark_dynamic", planted)
    with pytest.raises(pytest.fail.Exception, match=r"^torch [\w.+]+: torch._dynamo.maybe_mark_dynamic .*all batches.*$"):
        marked_lengths_share_one_graph()
