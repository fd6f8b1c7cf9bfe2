"""The reference's mixture of experts against transformers and, where these have nothing, sums by hand."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

from tests.combinations import network
from tests.combinations.cases import SIZES, batch, configured, far, shaken
from tests.combinations.experts import Routed, loads, mixture, moved
from tests.combinations.loop import beside
from tests.combinations.network import Shown, gradients
from tests.combinations.weights import kind, router_biases, shapes

MOE = {**SIZES, "feed_forward": "moe", "n_routed_experts": 6, "moe_intermediate_size": 12, "n_shared_experts": 2}
SOFTMAX = {"scoring_func": "softmax", "norm_topk_prob": False, "router_bias": False}
GROUPS = {"n_group": 3, "topk_group": 2, "routed_scaling_factor": 2.5}
KEYS = {"sigmoid": {}, "groups": GROUPS, "softmax": SOFTMAX, "softmax groups": {**SOFTMAX, **GROUPS}}


def layer_of(config: Any) -> dict[str, Tensor]:
    """Weights of the first layer by their names in it, and a bias that is not zero."""
    prefix, weights = "model.layers.0.", shaken(config) | router_biases(config)
    found = {name.removeprefix(prefix).removesuffix(".weight"): w.float() for name, w in weights.items() if prefix in name}
    if config.model.router_bias:
        found["mlp.gate.e_score_correction_bias"] = torch.linspace(-0.1, 0.1, 6)
    return {name: weight.requires_grad_(not name.endswith("bias")) for name, weight in found.items()}


def theirs_of(config: Any, w: dict[str, Tensor]) -> Any:
    model = config.model
    keys = {"n_routed_experts", "n_shared_experts", "num_experts_per_tok", "n_group", "topk_group", "routed_scaling_factor"}
    own = model.model_dump(include={"hidden_size", "moe_intermediate_size", "num_attention_heads", "norm_topk_prob", *keys})
    own["experts_implementation"] = "eager"
    if model.scoring_func == "softmax":
        method = "group_limited_greedy" if model.n_group > 1 else "greedy"
        made: Any = DeepseekV2Moe(DeepseekV2Config(**own, topk_method=method))
    else:
        made = DeepseekV3MoE(DeepseekV3Config(**own))
        made.gate.e_score_correction_bias.copy_(w["mlp.gate.e_score_correction_bias"])
    made.gate.weight.data.copy_(w["mlp.gate"])
    for e in range(6):
        joined = torch.cat([w[f"mlp.experts.{e}.{name}_proj"] for name in ("gate", "up")])
        made.experts.gate_up_proj.data[e].copy_(joined)
        made.experts.down_proj.data[e].copy_(w[f"mlp.experts.{e}.down_proj"])
    shared = {f"{name}_proj.weight": w[f"mlp.shared_experts.{name}_proj"] for name in ("gate", "up", "down")}
    made.shared_experts.load_state_dict(shared)
    return made


@pytest.mark.parametrize("name", KEYS)
def test_a_layer_is_that_of_transformers(name: str):
    config = configured(model={**MOE, **KEYS[name]})
    w, routed = layer_of(config), list[Routed]()
    theirs = theirs_of(config, w)
    h_BSD = torch.randn(3, 8, SIZES["hidden_size"], generator=torch.Generator().manual_seed(0))
    got = mixture(config.model, w, h_BSD, partial(network._mlp, config.model, w), routed)
    want = theirs(h_BSD)
    assert far(got, want) < 1e-5
    of_y = torch.randn(want.shape, generator=torch.Generator().manual_seed(1))
    (got * of_y).sum().backward()
    (want * of_y).sum().backward()
    assert far(w["mlp.gate"].grad, theirs.gate.weight.grad) < 1e-5
    for e in range(6):
        assert far(w[f"mlp.experts.{e}.down_proj"].grad, theirs.experts.down_proj.grad[e]) < 1e-5
    chosen = theirs.gate(h_BSD)[-1].flatten()
    assert routed[0].load_E.tolist() == torch.bincount(chosen, minlength=6).tolist()


def test_losses_are_summed_token_by_token():
    config = configured(
        model={**MOE, "router_aux_loss_coef": 0.3, "router_z_loss_coef": 0.2, "norm_topk_prob": False, "router_bias": False}
    )
    w, routed, S = layer_of(config), list[Routed](), 4
    h_BSD = torch.randn(2, S, SIZES["hidden_size"], generator=torch.Generator().manual_seed(0))
    mixture(config.model, w, h_BSD, partial(network._mlp, config.model, w), routed)
    want = 0.0
    for row in (h_BSD @ w["mlp.gate"].T).tolist():
        f_E, P_E = [0.0] * 6, [0.0] * 6
        for logits in row:
            scores = [1 / (1 + math.exp(-z)) for z in logits]
            for e in sorted(range(6), key=scores.__getitem__)[-2:]:
                f_E[e] += 6 / (2 * S)
            P_E = [p + s / sum(scores) / S for p, s in zip(P_E, scores, strict=True)]
            want += 0.2 * math.log(sum(map(math.exp, logits))) ** 2
        want += 0.3 * S * sum(f * p for f, p in zip(f_E, P_E, strict=True))
    assert routed[0].loss.item() == pytest.approx(want, rel=1e-5)


def test_the_reported_loss_is_without_what_routers_add_and_the_gradients_have_it():
    plain, both = (configured(model={**MOE, "router_z_loss_coef": coefficient}) for coefficient in (0.0, 0.5))
    weights, shown = shaken(plain) | router_biases(plain), list[Shown]()
    (one, without), (other, found) = gradients(plain, weights, [batch()]), gradients(both, weights, [batch()], shown=shown)
    assert one == other and far(found["model.layers.0.mlp.gate.weight"], without["model.layers.0.mlp.gate.weight"]) > 1e-2
    assert set(found) == set(shapes(plain)), "a bias has a gradient"
    (tokens,) = {int(load.sum()) for load in loads(plain, [one.routed for one in shown]).values()}
    assert tokens == 2 * batch()[0].numel()


@pytest.mark.parametrize("better", [0.0, 1.0])
def test_tokens_go_elsewhere_beside_the_weights_only_where_experts_are_hardly_better(better: float):
    config = configured(model={**MOE, "num_hidden_layers": 1, "num_experts_per_tok": 1})
    weights, found = shaken(config) | router_biases(config), set[tuple[float, ...]]()
    weights["model.layers.0.mlp.gate.weight"] *= 1e-3
    weights["model.layers.0.mlp.gate.e_score_correction_bias"][2] = better
    for seed in range(8):
        shown = list[Shown]()
        gradients(config, beside(weights, torch.Generator().manual_seed(seed)), [batch()], torch.bfloat16, shown)
        found |= {tuple(load_E.tolist()) for load_E in loads(config, [one.routed for one in shown]).values()}
    assert (len(found) == 1) == bool(better)


@pytest.mark.parametrize(("step", "want"), [("sign", [-0.1, 0.1, 0.0, 0.0]), ("rms", [-0.1 * 2**0.5, 0.1 * 2**0.5, 0, 0])])
def test_biases_move_against_the_loads(step: str, want: list[float]):
    config = configured(model={**MOE, "router_bias_rate": 0.1, "router_bias_step": step})
    found = moved(config, {"a": torch.zeros(4)}, {"a": torch.tensor([7.0, 1, 4, 4])})
    torch.testing.assert_close(found["a"], torch.tensor(want))


def test_each_expert_is_a_tensor_of_its_own_and_first_layers_have_none():
    found = shapes(configured(model={**MOE, "first_k_dense_replace": 1}))
    assert found["model.layers.0.mlp.up_proj.weight"] == (40, 32)
    assert found["model.layers.1.mlp.experts.5.down_proj.weight"] == (32, 12)
    assert found["model.layers.1.mlp.shared_experts.gate_proj.weight"] == (24, 32)
    assert (
        kind("model.layers.1.mlp.experts.5.down_proj.weight") == "expert" and kind("model.layers.1.mlp.gate.weight") == "matrix"
    )
