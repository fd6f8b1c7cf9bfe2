"""The router of a mixture of experts: which experts a token goes to, with which weights, and what keeps their loads even.

Scores, choices and losses are float32 whatever the network computes in. Three things keep loads even, alone or together:

    bias      each expert has a bias that counts in the choice and not in the weight. After an update the biases of experts
              with more tokens than the mean go down, the others up (DeepSeek-AI 2024, DeepSeek-V3, section 2.1.2; Su 2025, "MoE
              Travelogue 3: a different way to allocate", kexue.fm/archives/10757). No loss, no gradient through it.
    aux loss  for each sequence, the sum over experts of their share of the choices times their mean score
              (DeepSeek-V3, equations 17 to 20): a sequence counts whole, however a batch is cut.
    z-loss    the squared log-sum-exp of a token's scores, so that these stay small (Zoph et al. 2022, ST-MoE).
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from model.parallel.layers import Kit
from model.parameters import ParameterSpec, set_spec
from model.sublayer import MAY_CHANGE, StreamConfig


class RouterConfig(StreamConfig, frozen=True):
    """Keys of the router."""

    n_routed_experts: int = Field(default=8, gt=0, description="Experts E among which the router chooses.")
    num_experts_per_tok: int = Field(default=2, gt=0, description="Experts K that a token goes to.")
    scoring_func: Literal["softmax", "sigmoid"] = Field(
        default="sigmoid",
        description="Scores of the experts: softmax over all (Mixtral, Qwen), or sigmoid of each (DeepSeek-V3).",
    )
    norm_topk_prob: bool = Field(default=True, description="Divide the scores of the chosen experts by their sum.")
    routed_scaling_factor: float = Field(default=1.0, gt=0, description="Multiplies the weights of the chosen experts.")
    n_group: int = Field(
        default=1,
        gt=0,
        description="Groups of neighbouring experts: a token chooses among those of its topk_group best groups. A group is as "
        "good as the sum of its two best scores (sigmoid, DeepSeek-V3) or as its best (softmax, DeepSeek-V2).",
    )
    topk_group: int = Field(default=1, gt=0, description="Groups that a token's experts come from, of n_group.")
    router_bias: bool = Field(
        default=True, description="A bias of each expert in the choice (DeepSeek-V3), moved by router_bias_rate without a loss."
    )
    router_bias_rate: Annotated[float, MAY_CHANGE] = Field(
        default=1e-3, ge=0, description="Step of the biases after each update; 0 = they stay."
    )
    router_bias_step: Annotated[Literal["sign", "rms"], MAY_CHANGE] = Field(
        default="sign",
        description="What the rate multiplies: the sign of an expert's distance from the mean load (DeepSeek-V3), or that "
        "distance over the RMS of all experts' (Su 2025, kexue.fm/archives/10757).",
    )
    router_aux_loss_coef: Annotated[float, MAY_CHANGE] = Field(
        default=0.0, ge=0, description="Weight of the loss per token that evens out the loads within each sequence; 0 = none."
    )
    router_z_loss_coef: Annotated[float, MAY_CHANGE] = Field(
        default=0.0, ge=0, description="Weight of the squared log-sum-exp of a token's logits in the loss; 0 = none."
    )


class Router(nn.Module):
    """Chooses K of E experts for every token.

    It is whole on every tensor-parallel rank. Each of them weights its own part of every expert with what it returns, so that
    its gradients are parts too, which are summed; losses of its own count on each rank by one part of their number.
    """

    weight: nn.Parameter

    def __init__(self, config: RouterConfig, kit: Kit):
        super().__init__()
        self.config, self.kit = config, kit
        E = config.n_routed_experts
        self.weight = nn.Parameter(torch.empty(E, config.hidden_size, dtype=kit.dtype))
        spec = ParameterSpec("matrix", tuple(self.weight.shape), None, config.initial, serves_local_heads=True)
        set_spec(self.weight, spec)
        self.bias_E = torch.zeros(E, dtype=torch.float32, requires_grad=True)
        """Counts in the choice. The number of tokens that went to each expert is added up as its gradient: in the backward, so
        that a pass which is recomputed, or which nobody trains on, counts once or not at all."""
        self.replicate: Callable[[Tensor], Tensor] = kit.replicate

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        super()._apply(fn, recurse)
        device = fn(self.bias_E.detach()).device  # moved with the network, and float32 whatever it becomes
        self.bias_E = self.bias_E.detach().to(device).requires_grad_()
        return self

    def forward(self, h_TD: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Weights (float32) and numbers (int64) of the experts that each token goes to, [T, K] both.

        Losses and loads are attached to the weights: they reach the gradients when these do.

        Args:
            h_TD: of `rows` sequences, or of this rank's part of each.
        """
        config = self.config
        wide = torch.promote_types(h_TD.dtype, torch.float32)
        logit_TE = F.linear(h_TD.to(wide), self.replicate(self.weight).to(wide))
        score_TE = logit_TE.softmax(-1) if config.scoring_func == "softmax" else logit_TE.sigmoid()
        expert_TK = self._choose(score_TE.detach())
        weight_TK = score_TE.gather(1, expert_TK)
        if config.norm_topk_prob:
            weight_TK = weight_TK / (weight_TK.sum(-1, keepdim=True) + 1e-20)
        weight_TK = weight_TK * config.routed_scaling_factor
        if torch.is_grad_enabled():
            load_BE = counts(expert_TK.view(rows, -1), config.n_routed_experts)
            losses = self._losses(logit_TE, score_TE, load_BE)
            weight_TK = _Attached.apply(weight_TK, losses, self.bias_E, load_BE.sum(0), self.kit.loss_scale)  # type: ignore[assignment]
        return weight_TK, expert_TK

    def _choose(self, score_TE: Tensor) -> Tensor:
        config = self.config
        choice_TE = score_TE + self.bias_E.detach() if config.router_bias else score_TE
        if config.n_group > 1:
            choice_TGe = choice_TE.unflatten(1, (config.n_group, -1))
            best = 2 if config.scoring_func == "sigmoid" else 1
            group_Tg = choice_TGe.topk(best, -1).values.sum(-1).topk(config.topk_group, -1).indices
            outside_TG = torch.ones_like(choice_TGe[..., 0], dtype=torch.bool).scatter_(1, group_Tg, False)
            choice_TE = choice_TGe.masked_fill(outside_TG[..., None], float("-inf")).flatten(1)
        return choice_TE.topk(config.num_experts_per_tok, -1).indices

    def _losses(self, logit_TE: Tensor, score_TE: Tensor, load_BE: Tensor) -> Tensor | None:
        """Auxiliary losses summed over tokens, 0-dim; None without any."""
        config, total = self.config, None
        if config.router_aux_loss_coef:
            rows, E = load_BE.shape
            load_BE = self.kit.context.sum(load_BE.to(score_TE.dtype))
            share_BE = load_BE * E / load_BE.sum(-1, keepdim=True)
            score_TE = score_TE / score_TE.sum(-1, keepdim=True) if config.scoring_func == "sigmoid" else score_TE
            total = config.router_aux_loss_coef * (share_BE * score_TE.view(rows, -1, E).sum(1)).sum()
        if config.router_z_loss_coef:
            z_loss = config.router_z_loss_coef * logit_TE.logsumexp(-1).square().sum()
            total = z_loss if total is None else total + z_loss
        return None if total is None else total / self.kit.size


BIAS = "mlp.gate.e_score_correction_bias"
"""Name of the bias in a layer's tensors, as Hugging Face has it."""


def router_bias_name(layer: int) -> str:
    """Of the bias of a layer's router in checkpoints."""
    return f"model.layers.{layer}.{BIAS}"


def counts(expert_BN: Tensor, experts: int) -> Tensor:
    """How often each expert occurs in each row, [B, experts] int64, without a wait for the device."""
    ends = group_ends(expert_BN.sort(dim=-1).values, experts)
    return ends.diff(dim=-1, prepend=torch.zeros_like(ends[..., :1]))


def group_ends(sorted_BN: Tensor, groups: int) -> Tensor:
    """Past-the-last position of each group's index in sorted rows, [B, groups] int64."""
    index = torch.arange(groups, device=sorted_BN.device).expand(*sorted_BN.shape[:-1], groups)
    return torch.searchsorted(sorted_BN, index.contiguous(), right=True)


class _Attached(torch.autograd.Function):
    """The weights as they are. When their gradient comes, the losses get theirs, and the bias the loads as its own."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, losses: Tensor | None, bias: Tensor, load: Tensor, scale: Tensor) -> Tensor:
        ctx.has_losses = losses is not None
        ctx.save_for_backward(load, scale)
        return weight.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        load, scale = ctx.saved_tensors
        return gradient, scale.to(gradient.dtype) if ctx.has_losses else None, load.float(), None, None
