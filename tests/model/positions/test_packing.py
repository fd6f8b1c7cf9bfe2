"""Packed documents: lists of far queries and keys against every pair, and the mark for torch.compile."""

from itertools import pairwise

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from model.positions.packing import document_of_tokens, mark_length_dynamic, pack_documents
from tests.model.libraries import relied_on

BOUNDARIES = [0, 3, 4, 11, 16]


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
