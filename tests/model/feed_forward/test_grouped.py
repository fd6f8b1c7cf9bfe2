"""Products of groups against a loop in plain torch, on a CPU."""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.feed_forward.grouped import grouped_linear

GROUPS = {
    "uneven": (5, 1, 7, 3),
    "first empty": (0, 4, 4, 2),
    "several empty": (0, 0, 6, 0),
    "last empty": (3, 2, 1, 0),
    "one row": (0, 1, 0, 0),
    "no rows": (0, 0, 0, 0),
}
COLUMNS, OUTPUTS = 6, 5


def drawn(sizes: Sequence[int], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, matrices and the ends of the groups."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(sizes), COLUMNS, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(len(sizes), OUTPUTS, COLUMNS, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return x, weight, torch.tensor(sizes).cumsum(0).int()


def with_gradients(y: Tensor, x: Tensor, weight: Tensor) -> list[Tensor]:
    """y, and the gradients of x and of the matrices for a drawn one of y."""
    of_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), of_y)]


@pytest.mark.parametrize("name", GROUPS)
def test_it_is_one_product_per_group(name: str):
    x, weight, ends = drawn(GROUPS[name])
    loop = [F.linear(rows, matrix) for rows, matrix in zip(x.split(GROUPS[name]), weight, strict=True)]
    want = with_gradients(torch.cat(loop), x, weight)
    got = with_gradients(grouped_linear(x, weight, ends), x, weight)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-14)


def test_the_gradient_may_be_a_view():
    x, weight, ends = drawn((2, 3))
    got = torch.autograd.grad(grouped_linear(x, weight, ends).sum(), (x, weight))
    want = torch.cat([torch.ones(n, OUTPUTS, dtype=torch.float64) @ m for n, m in zip((2, 3), weight, strict=True)])
    torch.testing.assert_close(got[0], want, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_rounds_and_repeats_its_bits(dtype: torch.dtype):
    sizes = GROUPS["uneven"]
    x, weight, ends = drawn(sizes, dtype)
    first, second = (with_gradients(grouped_linear(x, weight, ends), x, weight) for _ in range(2))
    assert all(one.dtype == dtype and one.equal(other) for one, other in zip(first, second, strict=True))
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    y = torch.cat([F.linear(rows, m) for rows, m in zip(wide[0].split(sizes), wide[1], strict=True)])
    of_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype).double()
    for ours, theirs in zip(first, [y.detach(), *torch.autograd.grad(y, wide, of_y)], strict=True):
        assert (ours.double() - theirs).norm() <= torch.finfo(dtype).eps * theirs.norm()


@pytest.mark.parametrize("name", ["uneven", "several empty"])
def test_torch_finds_the_operators_in_order(name: str):
    """Schemas, shapes without data, and the registered gradient, compiled ones too."""
    x, weight, ends = drawn(GROUPS[name], torch.float32)
    torch.library.opcheck(torch.ops.tiglon.grouped_linear.default, (x, weight, ends))
    gradient = torch.randn(len(x), OUTPUTS)
    plain = (gradient, x.detach(), weight.detach(), ends)
    torch.library.opcheck(torch.ops.tiglon.grouped_linear_backward.default, plain)
