"""A layer with experts against those of transformers: outputs and all gradients, and what its keys must be."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DeepseekV2Config, DeepseekV3Config, MixtralConfig, Qwen3MoeConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from model.config import ModelConfig
from model.feed_forward.moe import MixtureOfExperts
from model.feed_forward.swiglu import SwiGLU
from model.recompute import selective_contexts
from tests.model.feed_forward.layer import SIZES, T, layer, passed, stream

SOFTMAX = {"scoring_func": "softmax", "router_bias": False}
Case = tuple[dict[str, Any], Callable[[ModelConfig], nn.Module]]


def _deepseek_v3(config: ModelConfig) -> nn.Module:
    keys = ("n_routed_experts", "num_experts_per_tok", "n_shared_experts", "n_group", "topk_group", "norm_topk_prob")
    own = config.model_dump(include={*SIZES, *keys, "routed_scaling_factor"})
    return DeepseekV3MoE(DeepseekV3Config(**own, experts_implementation="eager"))


def _deepseek_v2(config: ModelConfig) -> nn.Module:
    keys = ("n_routed_experts", "num_experts_per_tok", "n_shared_experts", "n_group", "topk_group", "routed_scaling_factor")
    method = "group_limited_greedy" if config.n_group > 1 else "greedy"
    own = config.model_dump(include={*SIZES, *keys})
    return DeepseekV2Moe(DeepseekV2Config(**own, topk_method=method, experts_implementation="eager"))


def _qwen_3(config: ModelConfig) -> nn.Module:
    own = config.model_dump(include={*SIZES, "num_experts_per_tok", "norm_topk_prob"})
    return Qwen3MoeSparseMoeBlock(Qwen3MoeConfig(**own, num_experts=config.n_routed_experts, experts_implementation="eager"))


def _mixtral(config: ModelConfig) -> nn.Module:
    own = config.model_dump(include={"hidden_size", "num_attention_heads", "num_experts_per_tok"})
    experts = {"num_local_experts": config.n_routed_experts, "experts_implementation": "eager"}
    return MixtralSparseMoeBlock(MixtralConfig(**own, **experts, intermediate_size=config.moe_intermediate_size))


GROUPS = {"n_group": 4, "topk_group": 2}
CASES: dict[str, Case] = {
    "deepseek-v3": ({"routed_scaling_factor": 2.5, "n_shared_experts": 2}, _deepseek_v3),
    "deepseek-v3 in groups": ({**GROUPS, "num_experts_per_tok": 3}, _deepseek_v3),
    "deepseek-v3, one expert": ({"num_experts_per_tok": 1, "norm_topk_prob": False}, _deepseek_v3),
    "deepseek-v3, weights as scored": ({"norm_topk_prob": False}, _deepseek_v3),
    "deepseek-v2": ({**SOFTMAX, "norm_topk_prob": False, "routed_scaling_factor": 3.0}, _deepseek_v2),
    "deepseek-v2 in groups": ({**SOFTMAX, **GROUPS, "norm_topk_prob": False, "n_shared_experts": 2}, _deepseek_v2),
    "qwen 3": ({**SOFTMAX, "n_shared_experts": 0, "num_experts_per_tok": 4}, _qwen_3),
    "qwen 3, weights as scored": ({**SOFTMAX, "n_shared_experts": 0, "norm_topk_prob": False}, _qwen_3),
    "qwen 3, one expert": ({**SOFTMAX, "n_shared_experts": 0, "norm_topk_prob": False, "num_experts_per_tok": 1}, _qwen_3),
    "mixtral": ({**SOFTMAX, "n_shared_experts": 0}, _mixtral),
    "mixtral, all experts": ({**SOFTMAX, "n_shared_experts": 0, "num_experts_per_tok": 8}, _mixtral),
}


def _theirs(ours: MixtureOfExperts, theirs: Any) -> None:
    """Give them our weights."""
    theirs.gate.weight.data.copy_(ours.gate.weight)
    theirs.experts.gate_up_proj.data.copy_(torch.cat((ours.experts.gate_proj, ours.experts.up_proj), 1))
    theirs.experts.down_proj.data.copy_(ours.experts.down_proj)
    if ours.gate.config.router_bias:
        theirs.gate.e_score_correction_bias.copy_(ours.gate.bias_E.detach())
    if ours.shared_experts is not None:
        theirs.shared_experts.load_state_dict(ours.shared_experts.state_dict())


def _their_gradients(theirs: Any, h_TD: Tensor) -> dict[str, Tensor]:
    h_TD = h_TD.detach().requires_grad_()
    y_BTD = theirs(h_TD.view(2, T // 2, -1))
    y_BTD.flatten(0, 1).backward(torch.randn(h_TD.shape, generator=torch.Generator().manual_seed(2)))
    found = {"y": y_BTD.detach().flatten(0, 1), "h": h_TD.grad, "gate.weight": theirs.gate.weight.grad}
    found["experts.gate_proj"], found["experts.up_proj"] = theirs.experts.gate_up_proj.grad.chunk(2, 1)
    found["experts.down_proj"] = theirs.experts.down_proj.grad
    shared = theirs.shared_experts.named_parameters() if hasattr(theirs, "shared_experts") else ()
    return found | {f"shared_experts.{name}": parameter.grad for name, parameter in shared}


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_transformers(name: str):
    keys, made = CASES[name]
    ours = layer(**keys)
    theirs = made(ModelConfig(feed_forward="moe", **SIZES, **keys))
    _theirs(ours, theirs)
    want, got = _their_gradients(theirs, stream()), passed(ours, stream())
    assert want.keys() == got.keys() - {"load"}
    for key, tensor in want.items():
        assert (got[key] - tensor).norm() <= 1e-5 * tensor.norm() and tensor.norm() > 0, key


@pytest.mark.parametrize("keys", [{}, SOFTMAX], ids=["sigmoid", "softmax"])
def test_one_normalised_expert_gives_the_router_no_gradient(keys: dict[str, Any]):
    ours = layer(num_experts_per_tok=1, **keys)
    theirs = (_qwen_3 if keys else _deepseek_v3)(ModelConfig(feed_forward="moe", **SIZES, num_experts_per_tok=1, **keys))
    if keys:
        ours.shared_experts = None
    _theirs(ours, theirs)
    want, got = _their_gradients(theirs, stream()), passed(ours, stream())
    scale = got["experts.gate_proj"].norm()
    assert want["gate.weight"].norm() <= 1e-6 * scale
    assert got["gate.weight"].norm() <= 1e-6 * scale


def test_gradients_are_those_of_finite_differences():
    """Losses of the router among them, that are multiplied as the loss is."""
    made = layer(torch.float64, router_z_loss_coef=0.1, num_experts_per_tok=3)
    made.kit.loss_scale.fill_(0.5)
    h_TD, of_y_TD = stream(torch.float64), torch.randn(T, 16, generator=torch.Generator().manual_seed(2)).double()
    got = passed(made, h_TD)

    def objective() -> float:
        with torch.no_grad():
            logit_TE = h_TD @ made.gate.weight.T
            z_loss = 0.1 * logit_TE.logsumexp(-1).square().sum()
            return ((made(h_TD, 2) * of_y_TD).sum() + 0.5 * z_loss).item()

    leaves = {"h": h_TD, **dict(made.named_parameters())}
    for name, leaf in leaves.items():
        direction = torch.randn(leaf.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        ends = []
        for sign in (1, -1):
            leaf.data += sign * 1e-6 * direction
            ends.append(objective())
            leaf.data -= sign * 1e-6 * direction
        want = (ends[0] - ends[1]) / 2e-6
        assert (got[name] * direction).sum().item() == pytest.approx(want, rel=1e-6), name


@pytest.mark.parametrize("tokens", [1, 2, 64])
def test_no_expert_is_full_and_none_needs_a_token(tokens: int):
    """A bias sends all tokens to two experts."""
    made = layer(n_shared_experts=0)
    made.gate.bias_E.data.zero_()[:2] += 10
    got = passed(made, stream(tokens=tokens), rows=1)
    assert got["load"].tolist() == [tokens] * 2 + [0] * 6
    assert not got["experts.up_proj"][2:].any() and got["experts.up_proj"][:2].flatten(1).any(1).all()
    assert got["y"].any(1).all() and all(tensor.isfinite().all() for tensor in got.values())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("scores", ["sigmoid", "softmax"])
def test_what_is_not_finite_is_seen_in_the_gradients_and_crashes_nothing(value: float, scores: str):
    made = layer(scoring_func=scores, n_group=2, topk_group=1)
    made.gate.weight.data[3, 5] = value
    got = passed(made, stream())
    assert got["load"].sum() == T * 2
    assert not got["gate.weight"].isfinite().all() or not got["h"].isfinite().all()


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recomputed_it_gives_the_same_bits_and_counts_once(mode: str):
    made = layer(router_aux_loss_coef=0.1, router_z_loss_coef=0.1)
    want, forward = passed(made, stream()), made.forward
    contexts = {"context_fn": selective_contexts} if mode == "selective" else {}
    made.forward = lambda h_TD, rows: checkpoint(forward, h_TD, rows, use_reentrant=False, **contexts)
    got = passed(made, stream())
    assert all(got[key].equal(tensor) for key, tensor in want.items())


def test_two_passes_have_the_same_bits_and_add_their_loads():
    made, h_TD = layer(torch.bfloat16), stream(torch.bfloat16)
    first, second = passed(made, h_TD), passed(made, h_TD)
    assert all(second[key].equal(tensor) for key, tensor in first.items())
    made(h_TD, 2).sum().backward()
    assert made.gate.bias_E.grad is not None and made.gate.bias_E.grad.equal(2 * first["load"])
    with torch.no_grad():
        made(h_TD, 2)
    assert made.gate.bias_E.grad.equal(2 * first["load"]), "an evaluation was counted"


def test_first_layers_are_dense():
    config = ModelConfig(feed_forward="moe", **SIZES, first_k_dense_replace=2)
    assert [MixtureOfExperts.of_layer(config, index) for index in range(3)] == [SwiGLU, SwiGLU, MixtureOfExperts]
    assert config.layers_with_experts == (2, 3, 4, 5)


REFUSED = {
    "mlp_bias = true": {"mlp_bias": True},
    "first_k_dense_replace = 6 leaves none": {"first_k_dense_replace": 6},
    "num_experts_per_tok = 9 is above n_routed_experts = 8": {"num_experts_per_tok": 9},
    "n_group = 3 does not divide": {"n_group": 3},
    "topk_group = 5 is above n_group = 4": {"n_group": 4, "topk_group": 5},
    "have 2 experts, fewer than num_experts_per_tok = 3": {"n_group": 4, "num_experts_per_tok": 3},
    "leaves groups of one expert": {"n_group": 8, "topk_group": 2},
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_is_refused(words: str):
    with pytest.raises(ValueError, match=words):
        MixtureOfExperts.check(ModelConfig.model_construct(**{**ModelConfig().model_dump(), **REFUSED[words]}))
