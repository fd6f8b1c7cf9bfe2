import pytest
import torch
from torch.nn.functional import cross_entropy as torch_cross_entropy

import model.loss
from model.loss import CHUNKS, ChunkLimits, chunk_tokens, cross_entropy
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


@pytest.mark.parametrize("tokens", [1000, 10, 1])
def test_loss_and_gradients_are_torchs_whatever_the_chunks(monkeypatch: pytest.MonkeyPatch, tokens: int):
    values = case(torch.float64)
    monkeypatch.setitem(model.loss.CHUNKS, "cpu", ChunkLimits(tokens * 22, 1, 1))
    for got, want in zip(ours(*values), reference(*values), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_bf16_errs_at_most_twice_as_much_as_plain_bf16():
    values = case(torch.float32)
    exact = reference(*(value.double() if value.is_floating_point() else value for value in values))
    narrow = [value.bfloat16() if value.is_floating_point() else value for value in values]
    for got, plain, want in zip(ours(*narrow), reference(*narrow), exact, strict=True):
        assert (got.double() - want).norm() <= 2 * (plain.double() - want).norm() + 1e-6 * want.norm()


def test_bf16_gradients_have_no_factor_of_their_own():
    """The gradient of the loss, one over a count, is no bfloat16 number: rounded, it would be off by 0.342 %."""
    h_TD, weight_VD, targets_T = case(torch.float32)
    gradient = torch.tensor(1 / 983040)
    values = [value.bfloat16() for value in (h_TD, weight_VD)]
    gradients = []
    for factor in (torch.ones(()), gradient):
        h, weight = (value.clone().requires_grad_() for value in values)
        loss, _ = cross_entropy(h, weight, targets_T)
        gradients.append(torch.autograd.grad(loss, (h, weight), factor))
    for whole, scaled in zip(*gradients, strict=True):
        assert (scaled.double().norm() / whole.double().norm() / gradient.double()).item() == pytest.approx(1, abs=5e-4)


@pytest.mark.parametrize("columns", [22, 20])
def test_the_softmax_for_the_compiler_is_the_plain_one(columns: int):
    h_TD, weight_VD, targets_T = case(torch.float32)
    targets_T = torch.where(targets_T < columns, targets_T, 0)
    logits = h_TD @ weight_VD.T
    loss, dlogits = model.loss._whole_softmax(logits, targets_T, columns)
    want, want_dlogits = model.loss._softmax(logits.clone(), targets_T, 0, columns, None)
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)
    torch.testing.assert_close(dlogits, want_dlogits, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_the_compiled_loss_is_the_plain_one(monkeypatch: pytest.MonkeyPatch):
    """With chunks of 13 tokens and a shorter last one."""
    monkeypatch.setitem(model.loss.CHUNKS, "cpu", ChunkLimits(1, 13 * 22, 1))
    values = case(torch.float32)
    h, weight = (value.clone().requires_grad_() for value in values[:2])
    loss, _ = cross_entropy(h, weight, values[2], compiled=True)
    got = [loss.detach(), *torch.autograd.grad(3 * loss, (h, weight))]
    for value, want in zip(got, reference(*values), strict=True):
        torch.testing.assert_close(value, want, rtol=1e-5, atol=1e-5)


def split_vocabulary(rank: int, world_size: int) -> None:
    h_TD, weight_VD, targets_T = case(torch.float64)
    share = weight_VD.shape[0] // world_size
    weight_vD = weight_VD[rank * share : (rank + 1) * share]
    loss, dh, dweight = ours(h_TD, weight_vD, targets_T, torch.distributed.group.WORLD, rank)
    want_loss, want_dh, want_dweight = reference(h_TD, weight_VD, targets_T)
    torch.distributed.all_reduce(dh)
    torch.testing.assert_close(loss, want_loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(dh, want_dh, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dweight, want_dweight[rank * share : (rank + 1) * share], rtol=1e-12, atol=1e-12)


def test_a_vocabulary_split_over_ranks_gives_the_same():
    run_ranks(split_vocabulary, 2)


def padded(weight_VD: torch.Tensor, rows: int) -> torch.Tensor:
    """With rows behind that would be far the most probable."""
    return torch.cat([weight_VD, 9 * weight_VD[:1].expand(rows, -1)])


@pytest.mark.parametrize("tokens", [1000, 10])
@pytest.mark.parametrize("rows", [1, 26])
def test_rows_of_padding_take_no_part(monkeypatch: pytest.MonkeyPatch, rows: int, tokens: int):
    """Padding in the softmax would change the loss by more than 1 %, whatever it held."""
    monkeypatch.setitem(model.loss.CHUNKS, "cpu", ChunkLimits(tokens * 22, 1, 1))
    h_TD, weight_VD, targets_T = case(torch.float64)
    h, weight = h_TD.clone().requires_grad_(), padded(weight_VD, rows).requires_grad_()
    loss, _ = cross_entropy(h, weight, targets_T, vocabulary=22)
    dh, dweight = torch.autograd.grad(3 * loss, (h, weight))
    for got, want in zip((loss.detach(), dh, dweight[:22]), reference(h_TD, weight_VD, targets_T), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert not dweight[22:].any()


def split_padding(rank: int, world_size: int) -> None:
    """22 tokens over 4 ranks: with 16 rows per rank, two ranks have padding only."""
    h_TD, weight_VD, targets_T = case(torch.float64)
    want_loss, want_dh, want_dweight = reference(h_TD, weight_VD, targets_T)
    for share in (6, 7, 16):
        whole = padded(weight_VD, share * world_size - 22)
        h, weight = h_TD.clone().requires_grad_(), whole[rank * share : (rank + 1) * share].clone().requires_grad_()
        loss, _ = cross_entropy(h, weight, targets_T, torch.distributed.group.WORLD, rank, vocabulary=22)
        dh, dweight = torch.autograd.grad(3 * loss, (h, weight))
        torch.distributed.all_reduce(dh)
        want = torch.cat([want_dweight, torch.zeros(share * world_size - 22, 12, dtype=torch.float64)])
        torch.testing.assert_close(loss.detach(), want_loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(dh, want_dh, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(dweight, want[rank * share : (rank + 1) * share], rtol=1e-12, atol=1e-12)


def test_ranks_with_padding_or_nothing_else_give_the_same():
    run_ranks(split_padding, 4)


def test_without_gradients_none_are_formed():
    h_TD, weight_VD, targets_T = case(torch.float64)
    with torch.no_grad():
        loss, _ = cross_entropy(h_TD, weight_VD, targets_T)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, reference(h_TD, weight_VD, targets_T)[0])


@pytest.mark.parametrize(
    ("device", "vocabulary", "tokens", "compiled", "chunk"),
    [
        ("cpu", 4096, 2048, False, 1024),
        ("cpu", 131072, 2048, False, 256),
        ("cpu", 4096, 1500, False, 750),  # 1,024 and 476 before
        ("cuda", 128256, 8192, True, 8192),
        ("cuda", 128256, 8192, False, 4096),
        ("cuda", 128256, 8193, False, 4097),
        ("cuda", 1 << 20, 8192, True, 4096),
        ("cpu", 4096, 0, False, 1),
    ],
)
def test_chunks_are_alike_and_not_small(device: str, vocabulary: int, tokens: int, compiled: bool, chunk: int):
    assert chunk_tokens(device, vocabulary, tokens, compiled) == chunk


def test_no_chunk_is_larger_than_the_policy():
    for tokens in range(1, 3000, 7):
        chunk = chunk_tokens("cpu", 4096, tokens)
        count = -(-tokens // chunk)
        assert chunk <= 1024 and count * chunk - tokens < count and count == -(-tokens // 1024)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_several_chunks_on_a_gpu_are_one(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype):
    """The gradient of the weight is summed in float32: bf16 sums of sixteen chunks would err three times as much."""
    h_TD, weight_VD, targets_T = (value.cuda() for value in case(torch.float32, tokens=512, vocabulary=128))
    h_TD, weight_VD = h_TD.to(dtype), weight_VD.to(dtype)
    whole = ours(h_TD, weight_VD, targets_T)
    monkeypatch.setitem(CHUNKS, "cuda", ChunkLimits(32 * 128, 1, 1))
    for got, want in zip(ours(h_TD, weight_VD, targets_T), whole, strict=True):
        assert (got - want).norm() <= (4e-3 if dtype == torch.bfloat16 else 1e-6) * want.norm()
