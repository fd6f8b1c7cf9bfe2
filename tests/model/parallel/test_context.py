"""How ranks share the tokens of a sequence, and what they exchange."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from model.parallel import context as module
from model.parallel.context import WHOLE_SEQUENCES, ContextParallel
from model.parallel.mesh import make_kit, make_mesh
from tests.ranks import run_ranks

CPU = torch.device("cpu")


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_token_is_of_one_rank_and_all_see_as_much(ranks: int):
    length, places = 24 * ranks, [ContextParallel(ranks, rank) for rank in range(ranks)]
    tokens = torch.arange(length)[None]
    owned = [place.cut(tokens)[0] for place in places]
    assert sorted(torch.cat(owned).tolist()) == list(range(length))
    visible = [int((own + 1).sum()) for own in owned]
    assert set(visible) == {length * (length + 1) // 2 // ranks}
    for place, own in zip(places, owned, strict=True):
        assert own.tolist() == [token for start, end in place.chunks(length) for token in range(start, end)] or ranks == 1


def test_lengths_that_do_not_divide_are_continued():
    place = ContextParallel(2, 1)
    assert (place.padded(9), place.padded(12), WHOLE_SEQUENCES.padded(9)) == (12, 12, 9)
    assert place.cut(torch.arange(1, 10)[None], fill=-100).tolist() == [[4, 5, 6, 7, 8, 9]]
    assert ContextParallel(2, 0).cut(torch.arange(1, 10)[None], fill=-100).tolist() == [[1, 2, 3, -100, -100, -100]]
    assert place.cut(torch.ones(2, 9, 3, 5)).shape == (2, 6, 3, 5)


def whole(batch: int, length: int, *parts: tuple[int, int]) -> list[Tensor]:
    """The same on every rank: [B, S, heads, width] of each part."""
    generator = torch.Generator().manual_seed(length)
    return [torch.randn(batch, length, *part, generator=generator, dtype=torch.float64) for part in parts]


def exchanges(rank: int, world_size: int, batch: int) -> None:
    """What arrives, and the gradients of it: of a sum that each rank weights otherwise."""
    place = make_kit(make_mesh(1, CPU, context_parallel_size=world_size)).context
    length, parts, generator = 8 * world_size, ((world_size * 2, 3), (1, 5), (world_size, 2)), torch.Generator().manual_seed(1)
    sequences = whole(batch, length, *parts)
    own = [place.cut(x).requires_grad_() for x in sequences]
    assert all(place.join(place.cut(x[..., 0])).equal(x[..., 0]) for x in sequences)

    halves = [half.result() for half in place.begin_gather(*own)]
    gathered = [torch.cat(both, dim=1) for both in zip(*halves, strict=True)]
    assert all(x.equal(y) for x, y in zip(gathered, sequences, strict=True))
    weights = [torch.randn(world_size, *x.shape, generator=generator, dtype=torch.float64) for x in gathered]
    loss = sum((x * weight[rank]).sum() for x, weight in zip(gathered, weights, strict=True))
    for gradient, weight in zip(torch.autograd.grad(loss, own), weights, strict=True):
        torch.testing.assert_close(gradient, place.cut(weight.sum(dim=0)), rtol=1e-12, atol=1e-12)

    by_heads = place.to_heads(*own)
    for x, y in zip(by_heads, sequences, strict=True):
        heads = y.repeat_interleave(max(1, world_size // y.shape[2]), dim=2).chunk(world_size, dim=2)
        assert x.equal(heads[rank])
    back = place.from_heads(by_heads[0] * (rank + 1))
    scaled = torch.cat([x * (index + 1) for index, x in enumerate(sequences[0].chunk(world_size, dim=2))], dim=2)
    assert back.equal(place.cut(scaled))
    weight = torch.randn(back.shape, generator=generator, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((back * weight).sum() + by_heads[1].sum() * (rank + 1), own[:1])
    factors = torch.arange(1, world_size + 1, dtype=torch.float64).repeat_interleave(2)[:, None]
    torch.testing.assert_close(gradient, weight * factors, rtol=1e-12, atol=1e-12)
    (shared,) = torch.autograd.grad(sum(x.sum() * (rank + 1) for x in place.to_heads(*own)[1:2]), own[1:2])
    assert shared.equal(torch.full_like(shared, sum(range(1, world_size + 1)))), "every rank has the head that all share"


@pytest.mark.parametrize(("ranks", "batch"), [(2, 1), (2, 3), (3, 2), (4, 1)])
def test_what_is_exchanged_arrives_in_order_and_so_do_gradients(ranks: int, batch: int):
    run_ranks(exchanges, ranks, batch)


class Recorder:
    """torch's collectives that are begun, which are noted, and what is waited for."""

    def __init__(self, calls: list[str]):
        self.calls = calls

    def __getattr__(self, name: str) -> Any:
        def begun(*arguments: Any, **keywords: Any) -> Any:
            assert keywords["async_op"]
            self.calls.append(name)
            work = getattr(dist, name)(*arguments, **keywords)
            return SimpleNamespace(wait=lambda: (self.calls.append("wait"), work.wait()))

        return begun


def order_of_calls(rank: int, world_size: int) -> list[str]:
    calls: list[str] = []
    place = make_kit(make_mesh(1, CPU, context_parallel_size=world_size)).context
    module.dist = Recorder(calls)  # type: ignore[assignment]  # a stand-in, in this rank's process alone
    x = place.cut(whole(1, 16, (1, 2))[0]).requires_grad_()

    def marked(y: Tensor, name: str) -> Tensor:
        calls.append(name)
        y = y * 1.0
        y.register_hook(lambda _: calls.append(f"backward of {name}"))
        return y

    early, late = place.begin_gather(x)
    assert early.arriving.numel() == 0, "nothing that arrives is known to autograd"
    first = marked(early.result()[0], "early")
    second = marked(late.result()[0], "late")
    (first.sum() + second.sum()).backward()
    return calls


def test_one_half_travels_while_the_other_is_computed():
    (calls, _) = run_ranks(order_of_calls, 2)
    gather, scatter, wait = "all_gather_into_tensor", "reduce_scatter_tensor", "wait"
    forward = [gather, gather, wait, "early", wait, "late"]
    assert calls == [*forward, "backward of late", scatter, "backward of early", scatter, wait, wait]


def many_exchanges(rank: int, world_size: int) -> int:
    place = make_kit(make_mesh(1, CPU, context_parallel_size=2)).context
    for _ in range(8000):
        x = torch.ones(2, 8, 2, 8, requires_grad=True)
        early, late = place.begin_gather(x * 1, x * 2)
        torch.stack([part.square().sum() for half in (early, late) for part in half.result()]).sum().backward()
        assert x.grad is not None and x.grad.eq(20).all()
    return rank


@pytest.mark.slow
def test_ranks_in_a_hurry_keep_their_memory():
    """Four pairs on fewer cores. When what arrives was known to autograd, most such runs lost a rank."""
    assert run_ranks(many_exchanges, 8, timeout_seconds=400) == list(range(8))


def merged(rank: int, world_size: int) -> None:
    """Keys cut into parts of 5, 1 and 3, one of which weighs e^60 times as much."""
    place = make_kit(make_mesh(1, CPU, context_parallel_size=world_size)).context
    generator = torch.Generator().manual_seed(3)
    scores, values = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((2, 7, 4, 9), (9, 6)))
    scores[0, 0, :, 5] += 60
    own, value = scores.split([5, 1, 3], dim=-1)[rank], values.split([5, 1, 3])[rank]
    out = place.merge_attention(own.softmax(-1) @ value, own.logsumexp(-1))
    torch.testing.assert_close(out, scores.softmax(-1) @ values, rtol=0, atol=1e-14)


def test_attention_over_the_keys_of_all_ranks():
    run_ranks(merged, 3)
