"""A mixture of experts by its formulas: every token through every expert, with weights that are 0 but for the chosen ones.

Scores and losses are float32 or wider. Terms are those of DeepSeek-V3 (arXiv 2412.19437), equations 12 to 20.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.combinations.weights import ROUTER_BIAS, Weights, has_experts


def wide(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it was."""
    return x if x.dtype == torch.float64 else x.float()


@dataclass(frozen=True)
class Routed:
    """What the router of a layer did in a pass."""

    load_E: Tensor
    """Tokens that went to each expert."""
    loss: Tensor
    """Auxiliary loss and z-loss, summed over tokens."""


def mixture(model: Any, w: Weights, h_BSD: Tensor, expert: Callable[[str, Tensor], Tensor], routed: list[Routed]) -> Tensor:
    """What a layer with experts adds to the stream.

    Args:
        w: weights of the layer by their names in it.
        expert: a gated linear unit by its name, on a stream.
        routed: is given what the router did.
    """
    logit_BSE = F.linear(wide(h_BSD), wide(w["mlp.gate"]))
    score_BSE = logit_BSE.softmax(-1) if model.scoring_func == "softmax" else 1 / (1 + (-logit_BSE).exp())
    chosen_BSE = _chosen(model, score_BSE.detach(), w.get(f"mlp.gate.{ROUTER_BIAS}"))
    weight_BSE = score_BSE * chosen_BSE
    if model.norm_topk_prob:
        weight_BSE = weight_BSE / weight_BSE.sum(-1, keepdim=True)
    weight_BSE = weight_BSE * model.routed_scaling_factor
    routed.append(Routed(chosen_BSE.sum((0, 1)), _losses(model, logit_BSE, score_BSE, chosen_BSE)))
    found = expert("mlp.shared_experts", h_BSD) if model.n_shared_experts else torch.zeros_like(h_BSD)
    for e in range(model.n_routed_experts):
        found = found + (weight_BSE[..., e, None] * wide(expert(f"mlp.experts.{e}", h_BSD))).to(h_BSD.dtype)
    return found


def _chosen(model: Any, score_BSE: Tensor, bias_E: Tensor | None) -> Tensor:
    """1 for the experts that a token goes to, 0 for the others."""
    choice_BSE = score_BSE if bias_E is None else score_BSE + bias_E.to(score_BSE.dtype)
    if model.n_group > 1:
        parts = choice_BSE.chunk(model.n_group, -1)
        best = 2 if model.scoring_func == "sigmoid" else 1
        quality = torch.stack([part.sort(-1, descending=True).values[..., :best].sum(-1) for part in parts], -1)
        rank_BSG = quality.argsort(-1, descending=True).argsort(-1)
        inside = (rank_BSG < model.topk_group).repeat_interleave(model.n_routed_experts // model.n_group, -1)
        choice_BSE = torch.where(inside, choice_BSE, -torch.inf)
    rank_BSE = choice_BSE.argsort(-1, descending=True).argsort(-1)
    return (rank_BSE < model.num_experts_per_tok).to(score_BSE.dtype)


def _losses(model: Any, logit_BSE: Tensor, score_BSE: Tensor, chosen_BSE: Tensor) -> Tensor:
    S, E, K = score_BSE.shape[1], model.n_routed_experts, model.num_experts_per_tok
    f_BE = chosen_BSE.sum(1) * E / (K * S)
    P_BE = (score_BSE / score_BSE.sum(-1, keepdim=True)).mean(1)
    balance = model.router_aux_loss_coef * S * (f_BE * P_BE).sum()
    return balance + model.router_z_loss_coef * logit_BSE.exp().sum(-1).log().square().sum()


def loads(config: Any, passes: Sequence[Sequence[Routed]]) -> Weights:
    """Tokens of an update that went to each expert, by the name of the layer's bias; `passes` have the layers with experts."""
    layers = [layer for layer in range(config.model.num_hidden_layers) if has_experts(config.model, layer)]
    found = torch.stack([torch.stack([routed.load_E for routed in one]) for one in passes]).sum(0) if layers else []
    return {f"model.layers.{layer}.mlp.gate.{ROUTER_BIAS}": load for layer, load in zip(layers, found, strict=True)}


def moved(config: Any, biases: Weights, loads: Weights) -> Weights:
    """The biases after an update that was not skipped."""
    found = {}
    for name, bias_E in biases.items():
        above_E = loads[name].double() - loads[name].double().mean()
        if config.model.router_bias_step == "sign":
            step_E = above_E.sign()
        else:
            step_E = above_E / above_E.square().mean().sqrt() if above_E.any() else above_E
        found[name] = bias_E - config.model.router_bias_rate * step_E.to(bias_E.dtype)
    return found
