"""What splits a batch on a CPU: every length, window and packing, by tiles and by three calls."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.attention.kernels import cpu_eager, cpu_tiled, dispatch, operator, three_calls
from model.attention.kernels.reference import reference_attention
from tests.model.attention.kernels.cases import CHUNKS, TWO_ROWS, chunk, error, packed, random_inputs


@settings(max_examples=20, deadline=None)
@given(S=st.integers(2, 150), window=st.integers(1, 149), far=st.booleans(), limit=st.sampled_from([0, 512]), data=st.data())
def test_exact_for_every_length_window_and_packing(S, window, far, limit, data):
    window = min(window, S - 1)
    cuts, queries = (
        data.draw(st.lists(st.integers(1, 2 * S - 1), max_size=4)),
        data.draw(st.sampled_from([S, S, 1, S // 3 + 1])),
    )
    documents = packed(*sorted({0, S, 2 * S, *cuts}), keys=S, queries=queries) if cuts else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(dispatch.BACKENDS, "cpu_tiled", replace(dispatch.BACKENDS["cpu_tiled"], max_tokens=limit))
        assert error(operator.attend, random_inputs(S, far, queries=queries), window, documents) < 1e-12


def test_documents_with_one_region():
    assert error(operator.attend, random_inputs(60, far=False), None, packed(0, 7, 8, 60, 120)) < 1e-12


def test_every_document_is_computed_by_its_own_length(monkeypatch):
    """Of documents of 30, 10 and 40 tokens with a limit of 30: tiles, tiles, three calls."""
    calls = []
    monkeypatch.setitem(dispatch.BACKENDS, "cpu_tiled", replace(dispatch.BACKENDS["cpu_tiled"], max_tokens=30))
    for name, module, index in (("tiles", cpu_tiled, 0), ("three calls", three_calls, 1)):
        forward = module.forward

        def recorded(*arguments, name=name, forward=forward, index=index):
            calls.append((name, arguments[index].v.shape[1]))
            return forward(*arguments)

        monkeypatch.setattr(module, "forward", recorded)
    operator.attend(random_inputs(40), 0.3, 12, packed(0, 30, 40, 80))
    assert calls == [("tiles", 30), ("tiles", 10), ("three calls", 40)]


def test_rows_are_computed_a_few_at_a_time(monkeypatch):
    """As many as keep their scores within the limit: 4 heads x 64 queries x 20 keys = 5,120 scores of a row."""
    monkeypatch.setattr(cpu_eager, "TILED_ELEMENTS", 11_000)
    parts = list(cpu_eager._self_contained_parts(random_inputs(20, B=5), None))
    assert [(rows.start, rows.stop) for rows, *_ in parts] == [(0, 2), (2, 4), (4, 6)]


@pytest.mark.parametrize("queries", [1, 5, 64, 100])
@pytest.mark.parametrize("case", CHUNKS)
def test_the_last_tokens_of_rows(case, queries):
    far, window, boundaries = CHUNKS[case]
    inputs, documents = chunk(700, queries, far, window, boundaries)
    assert error(operator.attend, inputs, window, documents) < 1e-12
    _, lse = operator.attend_with_lse(inputs, 0.3, window, documents)
    torch.testing.assert_close(lse, reference_attention(inputs, 0.3, window, documents)[1].detach(), rtol=0, atol=1e-12)


def test_a_document_without_queries_is_not_computed():
    inputs, documents = chunk(700, 100, False, None, TWO_ROWS)
    parts = [
        (rows.start, q.start, q.stop, k.start, k.stop) for rows, q, k in cpu_eager._self_contained_parts(inputs, documents)
    ]
    assert parts == [(0, 0, 50, 100, 650), (0, 50, 100, 650, 700), (1, 0, 100, 600, 700)]
