"""The router: choices by hand, losses by their formulas in float64, and biases that are no parameters."""

from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.feed_forward.router import Router, counts, group_ends
from model.parallel.layers import serial_kit

ROWS, S, E, K, D = 3, 8, 6, 2, 4
SIZES = {"hidden_size": D, "n_routed_experts": E, "num_experts_per_tok": K, "num_attention_heads": 1}


def router(dtype: torch.dtype = torch.float64, **keys: Any) -> Router:
    made = Router(ModelConfig(**{**SIZES, **keys}), serial_kit(dtype))
    made.weight.data.copy_(torch.randn(made.weight.shape, generator=torch.Generator().manual_seed(0)))
    return made


def stream(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(ROWS * S, D, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


def choosing(scores: list[float], **keys: Any) -> Router:
    """Its scores of TOKEN are these."""
    made, wanted = router(**keys), torch.tensor(scores)
    made.weight.data.zero_()[:, 0] = wanted.logit() if made.config.scoring_func == "sigmoid" else wanted.log()
    return made


TOKEN = torch.tensor([[1.0, 0, 0, 0]], dtype=torch.float64)
SIGMOID = [0.9, 0.1, 0.6, 0.5, 0.2, 0.85]
SOFTMAX = [0.3, 0.05, 0.15, 0.2, 0.05, 0.25]
PLAIN = {"scoring_func": "softmax", "router_bias": False}
CHOICES: dict[str, tuple[list[float], dict[str, Any], list[int], list[float]]] = {
    "sigmoid": (SIGMOID, {}, [0, 5], [0.9 / 1.75, 0.85 / 1.75]),
    "scaled": (SIGMOID, {"routed_scaling_factor": 2.0, "norm_topk_prob": False}, [0, 5], [1.8, 1.7]),
    "sum of two best": (SIGMOID, {"n_group": 3, "norm_topk_prob": False}, [2, 3], [0.6, 0.5]),
    "softmax": (SOFTMAX, {**PLAIN, "norm_topk_prob": False}, [0, 5], [0.3, 0.25]),
    "one best": (SOFTMAX, {**PLAIN, "n_group": 3}, [0, 1], [0.3 / 0.35, 0.05 / 0.35]),
    "one of one": (SIGMOID, {"num_experts_per_tok": 1}, [0], [1.0]),
}


@pytest.mark.parametrize("name", CHOICES)
def test_choices_and_weights_by_hand(name: str):
    scores, keys, experts, weights = CHOICES[name]
    weight_TK, expert_TK = choosing(scores, **keys)(TOKEN, 1)
    assert expert_TK.tolist() == [experts]
    torch.testing.assert_close(weight_TK, torch.tensor([weights], dtype=torch.float64), rtol=1e-6, atol=0)


def test_a_bias_counts_in_the_choice_and_not_in_the_weight():
    made = choosing(SIGMOID, norm_topk_prob=False)
    made.bias_E.data[1] = 0.78
    weight_TK, expert_TK = made(TOKEN, 1)
    assert expert_TK.tolist() == [[0, 1]]
    torch.testing.assert_close(weight_TK, torch.tensor([[0.9, 0.1]], dtype=torch.float64), rtol=1e-6, atol=0)
    made.bias_E.data[1] = 0.74
    assert made(TOKEN, 1)[1].tolist() == [[0, 5]]


def test_without_router_bias_there_is_none_in_the_choice():
    made = choosing(SIGMOID, router_bias=False)
    made.bias_E.data[1] = 9
    assert made(TOKEN, 1)[1].tolist() == [[0, 5]]


@pytest.mark.parametrize("keys", [{}, {"n_group": 3, "topk_group": 2}, PLAIN], ids=["all", "groups", "softmax"])
def test_equal_scores_give_different_experts(keys: dict[str, Any]):
    weight_TK, expert_TK = choosing([0.5] * E, **keys)(TOKEN.expand(7, D), 1)
    assert all(len({*row}) == K for row in expert_TK.tolist())
    torch.testing.assert_close(weight_TK, torch.full_like(weight_TK, 0.5))


def losses(made: Router, h_TD: Tensor) -> Tensor:
    """Of the router's own in plain torch, row by row."""
    config, total = made.config, torch.zeros((), dtype=torch.float64)
    for h_SD in h_TD.split(S):
        logit_SE = h_SD @ made.weight.T
        score_SE = logit_SE.softmax(-1) if config.scoring_func == "softmax" else logit_SE.sigmoid()
        choice_SK = (score_SE + made.bias_E.detach()).topk(K).indices
        f_E = torch.bincount(choice_SK.flatten(), minlength=E) * E / (K * S)
        P_E = (score_SE / score_SE.sum(-1, keepdim=True)).mean(0)
        total = total + config.router_aux_loss_coef * S * (f_E * P_E).sum()
        total = total + config.router_z_loss_coef * logit_SE.exp().sum(-1).log().square().sum()
    return total


@pytest.mark.parametrize("keys", [{}, PLAIN], ids=["sigmoid", "softmax"])
@pytest.mark.parametrize("coefficients", [(0.3, 0.0), (0.0, 0.2), (0.3, 0.2)], ids=["balance", "z", "both"])
def test_losses_reach_the_gradients_times_the_scale_of_the_loss(coefficients: tuple[float, float], keys: dict[str, Any]):
    """The weights are given a gradient of zero: what is left is the losses'."""
    made, h_TD = router(router_aux_loss_coef=coefficients[0], router_z_loss_coef=coefficients[1], **keys), stream()
    made.kit.loss_scale.fill_(0.25)
    (made(h_TD, ROWS)[0] * 0).sum().backward()
    want = torch.autograd.grad(0.25 * losses(made, h_TD), (made.weight, h_TD))
    for leaf, gradient in zip((made.weight, h_TD), want, strict=True):
        torch.testing.assert_close(leaf.grad, gradient, rtol=1e-12, atol=1e-12)


def test_loads_are_the_gradient_of_the_bias():
    made, h_TD = router(), stream()
    weight_TK, expert_TK = made(h_TD, ROWS)
    assert made.bias_E.grad is None, "counted before the backward"
    weight_TK.sum().backward()
    want = torch.bincount(expert_TK.flatten(), minlength=E)
    assert made.bias_E.grad is not None and made.bias_E.grad.tolist() == want.tolist()


def test_a_bias_stays_float32_in_a_narrow_network():
    made = router(torch.float32)
    made.bias_E.data[0] = 1 + 2**-20
    made = made.to(torch.bfloat16)
    assert made.weight.dtype == torch.bfloat16
    assert made.bias_E.dtype == torch.float32 and made.bias_E[0].item() == 1 + 2**-20
    assert made.bias_E.is_leaf and made.bias_E.requires_grad
    assert made(stream(torch.bfloat16), ROWS)[0].dtype == torch.float32
    assert [name for name, _ in made.named_parameters()] == ["weight"] and [*made.state_dict()] == ["weight"]


@pytest.mark.parametrize("shape", [(1, 1), (4, 30), (2, 0)])
def test_counts_and_ends_are_those_of_bincount(shape: tuple[int, int]):
    expert_BN = torch.randint(0, E - 1, shape, generator=torch.Generator().manual_seed(0))
    want = torch.stack([torch.bincount(row, minlength=E) for row in expert_BN])
    assert counts(expert_BN, E).equal(want)
    assert group_ends(expert_BN.sort(-1).values, E).equal(want.cumsum(-1))
