import pytest
import torch
from torch.nn.functional import cross_entropy as torch_cross_entropy

import model.loss
from model.loss import cross_entropy
from tests.ranks import run_ranks


def case(dtype: torch.dtype, tokens: int = 37, vocabulary: int = 22) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    h_TD = torch.randn(tokens, 12, generator=generator, dtype=dtype)
    weight_VD = torch.randn(vocabulary, 12, generator=generator, dtype=dtype)
    targets_T = torch.randint(0, vocabulary, (tokens,), generator=generator)
    targets_T[::5] = -100
    return h_TD, weight_VD, targets_T


def reference(h_TD: torch.Tensor, weight_VD: torch.Tensor, targets_T: torch.Tensor) -> list[torch.Tensor]:
    h, weight = h_TD.clone().requires_grad_(), weight_VD.clone().requires_grad_()
    loss = torch_cross_entropy(h @ weight.T, targets_T, reduction="sum", ignore_index=-100)
    return [loss.detach(), *torch.autograd.grad(3 * loss, (h, weight))]


def ours(h_TD: torch.Tensor, weight_VD: torch.Tensor, targets_T: torch.Tensor, group=None, rank: int = 0) -> list[torch.Tensor]:
    h, weight = h_TD.clone().requires_grad_(), weight_VD.clone().requires_grad_()
    loss, count = cross_entropy(h, weight, targets_T, group, rank)
    assert int(count) == int((targets_T >= 0).sum())
    return [loss.detach(), *torch.autograd.grad(3 * loss, (h, weight))]


@pytest.mark.parametrize("chunk_tokens", [1000, 10, 1])
def test_loss_and_gradients_are_torchs_whatever_the_chunks(monkeypatch: pytest.MonkeyPatch, chunk_tokens: int):
    values = case(torch.float64)
    monkeypatch.setitem(model.loss.CHUNK_NUMBERS, "cpu", chunk_tokens * 22)
    monkeypatch.setattr(model.loss, "LEAST_TOKENS", 1)
    for got, want in zip(ours(*values), reference(*values), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_bf16_errs_at_most_twice_as_much_as_plain_bf16():
    values = case(torch.float32)
    exact = reference(*(value.double() if value.is_floating_point() else value for value in values))
    narrow = [value.bfloat16() if value.is_floating_point() else value for value in values]
    for got, plain, want in zip(ours(*narrow), reference(*narrow), exact, strict=True):
        assert (got.double() - want).norm() <= 2 * (plain.double() - want).norm() + 1e-6 * want.norm()


def test_the_softmax_for_the_compiler_is_the_plain_one():
    h_TD, weight_VD, targets_T = case(torch.float32)
    logits = h_TD @ weight_VD.T
    loss, dlogits = model.loss._whole_softmax(logits, targets_T)
    want, want_dlogits = model.loss._softmax(logits.clone(), targets_T, 0, None)
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)
    torch.testing.assert_close(dlogits, want_dlogits, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_the_compiled_loss_is_the_plain_one(monkeypatch: pytest.MonkeyPatch):
    """With chunks of 13 tokens and a shorter last one."""
    monkeypatch.setitem(model.loss.CHUNK_NUMBERS, "cpu", 13 * 22)
    monkeypatch.setattr(model.loss, "LEAST_TOKENS", 1)
    values = case(torch.float32)
    h, weight = (value.clone().requires_grad_() for value in values[:2])
    loss, _ = cross_entropy(h, weight, values[2], compiled=True)
    got = [loss.detach(), *torch.autograd.grad(3 * loss, (h, weight))]
    for mine, want in zip(got, reference(*values), strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-5, atol=1e-5)


def split_vocabulary(rank: int, world_size: int) -> None:
    h_TD, weight_VD, targets_T = case(torch.float64)
    share = weight_VD.shape[0] // world_size
    mine = weight_VD[rank * share : (rank + 1) * share]
    loss, dh, dweight = ours(h_TD, mine, targets_T, torch.distributed.group.WORLD, rank)
    want_loss, want_dh, want_dweight = reference(h_TD, weight_VD, targets_T)
    torch.distributed.all_reduce(dh)
    torch.testing.assert_close(loss, want_loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(dh, want_dh, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dweight, want_dweight[rank * share : (rank + 1) * share], rtol=1e-12, atol=1e-12)


def test_a_vocabulary_split_over_ranks_gives_the_same():
    run_ranks(split_vocabulary, 2)


def test_without_gradients_none_are_formed():
    h_TD, weight_VD, targets_T = case(torch.float64)
    with torch.no_grad():
        loss, _ = cross_entropy(h_TD, weight_VD, targets_T)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, reference(h_TD, weight_VD, targets_T)[0])
