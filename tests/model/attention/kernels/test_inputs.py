"""The inputs of attention as a list and back, and the documents of tokens."""

import pytest
import torch

from model.attention.kernels.inputs import AttentionInputs, accumulation_dtype, boundaries_on_host, document_ids
from tests.model.attention.kernels.cases import packed, random_inputs


@pytest.mark.parametrize(("far", "count"), [(False, 3), (True, 5)])
def test_a_list_of_the_tensors_makes_the_same_inputs(far, count):
    inputs = random_inputs(7, far)
    assert len(inputs.tensors()) == count and AttentionInputs(*inputs.tensors()) == inputs
    assert (inputs.near().far_q, inputs.near().far_k) == (None, None)
    doubled = inputs.map(lambda x: 2 * x)
    assert all(torch.equal(a, 2 * b) for a, b in zip(doubled.tensors(), inputs.tensors(), strict=True))


def test_a_part_is_a_view_of_its_queries_and_keys():
    inputs = random_inputs(7, queries=3)
    assert (inputs.queries, inputs.tokens) == (3, 7)
    for whole in (inputs, inputs.near()):
        part = whole.part(slice(1, 2), slice(0, 2), slice(4, 7))
        cuts = (slice(0, 2), slice(4, 7), slice(4, 7), slice(0, 2), slice(4, 7))
        for x, view, tokens in zip(whole.tensors(), part.tensors(), cuts, strict=False):
            assert view.data_ptr() == x[1:2, tokens].data_ptr() and torch.equal(view, x[1:2, tokens])


def test_boundaries_on_the_host():
    inputs = random_inputs(10, queries=3)
    assert boundaries_on_host(inputs, None) == ([0, 3, 6], [0, 10, 20])
    documents = packed(0, 8, 10, 20, keys=10, queries=3)
    assert boundaries_on_host(inputs, documents) == ([0, 1, 3, 6], [0, 8, 10, 20])
    with pytest.raises(ValueError, match=r"documents of 20 queries and 20 keys, and wanted those of 2 x 3 .* 2 x 10 keys"):
        boundaries_on_host(inputs, packed(0, 8, 10, 20))


def test_tokens_of_one_document_have_one_number():
    ids = document_ids(packed(0, 3, 4, 5, 10), 2, 5)
    assert ids.tolist() == [[1, 1, 1, 2, 3], [4, 4, 4, 4, 4]]


def test_softmax_is_at_least_float32():
    assert [accumulation_dtype(d) for d in (torch.bfloat16, torch.float16, torch.float32)] == [torch.float32] * 3
    assert accumulation_dtype(torch.float64) == torch.float64
