"""Collectives against the definition by the whole tensors, and compiled ones against eager ones."""

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from model.parallel import collectives
from tests.model.libraries import relied_on
from tests.ranks import run_ranks

COLLECTIVES = ["replicate", "all_reduce", "gather_tokens", "reduce_scatter_tokens", "scatter_tokens", "gather_last"]


VIEWS: dict[str, Callable[[torch.Tensor], tuple[torch.Tensor, ...]]] = {
    "itself": lambda y: (y,),
    "reshaped": lambda y: (y.view(-1, 2),),
    "slices": lambda y: (y[..., :1], y[..., 1:]),
    "split": lambda y: y.split((1, y.shape[-1] - 1), dim=-1),
    "transposed": lambda y: (y.t(),),
}
"""What becomes of the result at the end of the same compiled graph."""


def values_and_gradients(rank: int, world_size: int) -> dict[str, list[list[float]]]:
    """Input, result and gradient of each collective, as lists: a tensor in shared memory would outlive its process.
    The loss of rank r weights its result by `weights(r)`."""
    results = {}
    for name in COLLECTIVES:
        x = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(rank)).requires_grad_()
        y = getattr(collectives, name)(x, dist.group.WORLD)
        (y * weights(rank, *y.shape)).sum().backward()
        assert x.grad is not None
        results[name] = [value.tolist() for value in (x, y, x.grad)]
    return results


def weights(rank: int, *shape: int) -> torch.Tensor:
    """The gradient of rank's loss with respect to its result."""
    elements = torch.arange(1, torch.Size(shape).numel() + 1, dtype=torch.float64)
    return (rank + 1) * elements.view(shape)


def definition(name: str, rank: int, x: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Result and gradient on one of two ranks, from the whole tensors."""
    half = slice(2 * rank, 2 * rank + 2)
    match name:
        case "replicate":
            return x[rank], weights(0, 4, 6) + weights(1, 4, 6)
        case "all_reduce":
            return x[0] + x[1], weights(rank, 4, 6)
        case "gather_tokens":
            return torch.cat(x), (weights(0, 8, 6) + weights(1, 8, 6))[4 * rank : 4 * rank + 4]
        case "reduce_scatter_tokens":
            return (x[0] + x[1])[half], torch.cat((weights(0, 2, 6), weights(1, 2, 6)))
        case "scatter_tokens":
            return x[rank][half], torch.cat((weights(0, 2, 6), weights(1, 2, 6)))
        case "gather_last":
            return torch.cat(x, dim=-1), weights(rank, 4, 12)[:, 6 * rank : 6 * rank + 6]
    raise AssertionError(name)


def test_results_and_gradients_are_those_of_the_definition():
    ranks = run_ranks(values_and_gradients, 2)
    for name, rank in itertools.product(COLLECTIVES, (0, 1)):
        inputs = [torch.tensor(results[name][0], dtype=torch.float64) for results in ranks]
        y, gradient = (torch.tensor(value, dtype=torch.float64) for value in ranks[rank][name][1:])
        want, want_gradient = definition(name, rank, inputs)
        torch.testing.assert_close(y, want, rtol=1e-12, atol=0, msg=lambda text, name=name: f"{name}: {text}")
        torch.testing.assert_close(gradient, want_gradient, rtol=1e-12, atol=0, msg=lambda text, name=name: f"{name}: {text}")


def differences_when_compiled(rank: int, world_size: int) -> dict[str, list[float]]:
    """Of the result and of the gradient, relative to the eager ones."""
    differences = {}
    for name, view in itertools.product(COLLECTIVES, VIEWS):
        collective, view_of = getattr(collectives, name), VIEWS[view]

        def block(x: torch.Tensor, collective=collective, view_of=view_of) -> tuple[torch.Tensor, ...]:
            return view_of(collective(3 * x, dist.group.WORLD))

        torch._dynamo.reset()
        pairs = []
        for run in (block, torch.compile(block, backend="aot_eager", fullgraph=True)):
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(rank)).requires_grad_()
            y = torch.cat([part.sin().reshape(-1) for part in run(x)])
            (y**2).sum().backward()
            assert x.grad is not None
            pairs.append((y.detach(), x.grad))
        differences[f"{name}, {view}"] = [float((got - want).norm() / want.norm()) for want, got in zip(*pairs)]
    return differences


def test_compiled_collectives_have_the_gradients_of_eager_ones():
    """Where only views of a result leave the graph, torch took them of what the collective read or wrote, past it."""
    for differences in run_ranks(differences_when_compiled, 2):
        wrong = {name: pair for name, pair in differences.items() if not max(pair) < 1e-6}
        assert not wrong


def unsafe_view_is_an_alias() -> None:
    with relied_on("torch", "aten._unsafe_view", "model.parallel.collectives returns results that autograd takes for no views"):
        x = torch.randn(3, 4)
        alias = collectives.alias_without_view(x)
        assert alias.data_ptr() == x.data_ptr() and torch.equal(alias, x), "it copies"
        assert not alias._is_view(), "it is a view"


def test_unsafe_view_is_an_alias():
    unsafe_view_is_an_alias()


@pytest.mark.parametrize("planted", [torch.Tensor.view, lambda x, shape: x.clone()], ids=["a view", "a copy"])
def test_a_torch_with_another_unsafe_view_is_seen(planted, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.ops.aten._unsafe_view, "default", planted)
    with pytest.raises(pytest.fail.Exception, match=r"^torch [\w.+]+: aten._unsafe_view .*no views.*$"):
        unsafe_view_is_an_alias()
