"""What surrounds torch's GPU flash operators, here with the operators by definition."""

import pytest
import torch

from model.attention.kernels import flash
from model.positions.packing import pack_documents
from tests.model.attention.kernels.cases import CHUNKS, DenseFlash, check_backend, chunk, random_inputs


@pytest.mark.parametrize("far", [True, False])
@pytest.mark.parametrize("boundaries", [None, (0, 5, 50, 90, 100)])
def test_composition_around_the_flash_operators(monkeypatch, boundaries, far):
    monkeypatch.setattr(flash, "aten", DenseFlash)
    documents = None
    if boundaries is not None:
        documents = pack_documents(torch.tensor(boundaries, dtype=torch.int32), 13, lists=True)
    check_backend(
        lambda *arguments: flash.forward(*arguments, documents),
        lambda *arguments: flash.backward(*arguments, documents),
        random_inputs(50, far), 13, documents,
    )  # fmt: skip


@pytest.mark.parametrize("queries", [1, 5, 64, 100])
@pytest.mark.parametrize("case", CHUNKS)
def test_the_last_tokens_of_rows(monkeypatch, case, queries):
    monkeypatch.setattr(flash, "aten", DenseFlash)
    far, window, boundaries = CHUNKS[case]
    inputs, documents = chunk(700, queries, far, window, boundaries)
    check_backend(
        lambda *arguments: flash.forward(*arguments, documents),
        lambda *arguments: flash.backward(*arguments, documents),
        inputs, window, documents,
    )  # fmt: skip


def test_documents_within_the_window_have_no_far_call(monkeypatch):
    calls = []

    class Counted(DenseFlash):
        @classmethod
        def _flash_attention_forward(cls, *arguments, **options):
            calls.append(options.get("window_size_left"))
            return super()._flash_attention_forward(*arguments, **options)

    monkeypatch.setattr(flash, "aten", Counted)
    documents = pack_documents(torch.tensor((0, 10, 20), dtype=torch.int32), 13, lists=True)
    with torch.no_grad():
        flash.forward(random_inputs(20, B=1), 0.3, 13, documents)
    assert calls == [12]


def test_a_window_as_long_as_the_row_is_no_window(monkeypatch):
    sizes = []

    class Noted(DenseFlash):
        @classmethod
        def _flash_attention_forward(cls, *arguments, **options):
            sizes.append(options.get("window_size_left"))
            return super()._flash_attention_forward(*arguments, **options)

    monkeypatch.setattr(flash, "aten", Noted)
    inputs = random_inputs(20, far=False, B=1)
    with torch.no_grad():
        (whole, _), (plain, _) = flash.forward(inputs, 0.3, 20, None), flash.forward(inputs, 0.3, None, None)
    assert sizes == [None, None] and torch.equal(whole, plain)
