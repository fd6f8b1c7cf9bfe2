"""Experts: copies of tokens in order, and sums of what is given, by hand and by dense formulas."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from model.feed_forward.experts import Experts, Sorted
from model.parallel.layers import serial_kit
from model.parameters import Normal, tensors_of

D, WIDTH, E, T, K = 6, 5, 4, 9, 2


def experts(dtype: torch.dtype = torch.float64) -> Experts:
    config: Any = SimpleNamespace(hidden_size=D, initial=Normal(0.5), residual_initial=Normal(0.5))
    made = Experts(config, E, WIDTH, serial_kit(dtype))
    generator = torch.Generator().manual_seed(0)
    for stack in made.parameters():
        stack.data.copy_(torch.randn(stack.shape, generator=generator))
    return made


def test_copies_are_sorted_by_expert_and_then_by_token():
    plan = Sorted.by_group(torch.tensor([[2, 0], [0, 3], [2, 3], [0, 2]]), E)
    assert plan.tokens.tolist() == [0, 1, 3, 0, 2, 3, 1, 2]
    assert plan.order_N.tolist() == [1, 2, 6, 0, 4, 7, 3, 5]
    assert plan.place_TK.tolist() == [[3, 0], [1, 6], [4, 7], [2, 5]]
    assert plan.ends_E.tolist() == [3, 3, 6, 8] and plan.ends_E.dtype == torch.int32


@pytest.mark.parametrize("one", [False, True], ids=["spread", "all to one"])
def test_it_is_the_weighted_sum_of_dense_networks(one: bool):
    made, generator = experts(), torch.Generator().manual_seed(1)
    h_TD = torch.randn(T, D, generator=generator, dtype=torch.float64).requires_grad_()
    expert_TK = torch.rand(T, E, generator=generator).topk(K).indices
    if one:
        expert_TK = torch.tensor([[3, 1]]).expand(T, K)
    weight_TK = torch.rand(T, K, generator=generator, dtype=torch.float64).requires_grad_()
    leaves = (h_TD, weight_TK, *made.parameters())
    of_y_TD = torch.randn(T, D, generator=generator, dtype=torch.float64)
    got = made(h_TD, weight_TK, expert_TK)
    stacks = zip(made.gate_proj, made.up_proj, made.down_proj, strict=True)
    all_ETD = torch.stack([F.linear(F.silu(h_TD @ gate.T) * (h_TD @ up.T), down) for gate, up, down in stacks])
    want = sum(weight_TK[:, k, None] * all_ETD[expert_TK[:, k], torch.arange(T)] for k in range(K))
    assert isinstance(want, torch.Tensor)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)
    ours, theirs = (torch.autograd.grad(y, leaves, of_y_TD) for y in (got, want))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


def test_a_stack_holds_one_matrix_per_expert_by_its_name():
    made = experts()
    held = tensors_of("mlp.experts.down_proj", made.down_proj)
    assert [tensor.name for tensor in held] == [f"mlp.experts.{e}.down_proj.weight" for e in range(E)]
    assert [tensor.start for tensor in held] == [e * D * WIDTH for e in range(E)]
    assert {(tensor.spec.kind, tensor.spec.part, tensor.spec.shape) for tensor in held} == {("expert", "experts", (D, WIDTH))}
