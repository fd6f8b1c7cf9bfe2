"""A mixture of experts: shared experts that every token passes, and routed ones of which each token passes a few.

Names are DeepSeek's at Hugging Face (DeepSeek-AI 2024, DeepSeek-V3, arXiv 2412.19437). What families call a mixture of experts
is a choice of keys: no shared experts and softmax (Mixtral, Qwen 3, OLMoE), or both kinds and sigmoid (DeepSeek-V3).
"""

from typing import Any

from pydantic import Field
from torch import Tensor

from model.feed_forward.base import FeedForward, Routed
from model.feed_forward.experts import Experts
from model.feed_forward.glu import GLUConfig
from model.feed_forward.router import Router, RouterConfig
from model.feed_forward.swiglu import SwiGLU
from model.parallel.layers import Kit
from model.parameters import spec_of
from model.sublayer import Execution, Kept


class MixtureConfig(RouterConfig, GLUConfig, frozen=True):
    """Keys of layers with experts."""

    moe_intermediate_size: int = Field(default=256, gt=0, description="Width F of each expert.")
    n_shared_experts: int = Field(default=1, ge=0, description="Experts that every token passes, as one of their joint width.")
    first_k_dense_replace: int = Field(default=0, ge=0, description="First layers that have a dense mlp instead of experts.")


class MixtureOfExperts(FeedForward):
    """The sum of shared experts and of each token's routed ones, their hidden units split over tensor-parallel ranks."""

    section = MixtureConfig

    def __init__(self, config: MixtureConfig, kit: Kit):
        super().__init__(config, kit)
        width = config.moe_intermediate_size
        self.local_width = kit.divide("moe_intermediate_size", width)
        self.count, self.chosen = config.n_routed_experts, config.num_experts_per_tok
        self.gate = Router(config, kit)
        self.experts: Any = Experts(config, config.n_routed_experts, width, kit)
        shared = config.n_shared_experts * width
        self.shared_experts = SwiGLU(config, kit, shared, summed=False) if shared else None

    @classmethod
    def of_layer(cls, config: Any, layer: int) -> type[FeedForward]:
        """As FeedForward.of_layer: the first layers are dense."""
        return SwiGLU if layer < config.first_k_dense_replace else cls

    @staticmethod
    def check(config: Any) -> None:
        """As Sublayer.check."""
        E, K, groups = config.n_routed_experts, config.num_experts_per_tok, config.n_group
        if config.mlp_bias:
            raise ValueError(
                "mlp_bias = true cannot be used with feed_forward = 'moe', whose experts have no biases; leave it out"
            )
        if config.first_k_dense_replace >= config.num_hidden_layers:
            raise ValueError(
                f"first_k_dense_replace = {config.first_k_dense_replace} leaves none of num_hidden_layers = "
                f"{config.num_hidden_layers} an expert; use fewer, or feed_forward = 'swiglu'"
            )
        if K > E:
            raise ValueError(f"num_experts_per_tok = {K} is above n_routed_experts = {E}; use at most {E}")
        if E % groups:
            raise ValueError(f"n_group = {groups} does not divide n_routed_experts = {E}; change one of them")
        if config.topk_group > groups:
            raise ValueError(f"topk_group = {config.topk_group} is above n_group = {groups}; use at most {groups}")
        if groups > 1 and config.topk_group * (E // groups) < K:
            raise ValueError(
                f"topk_group = {config.topk_group} of {groups} groups have {config.topk_group * (E // groups)} experts, fewer "
                f"than num_experts_per_tok = {K}; use more groups"
            )
        if groups > 1 and config.scoring_func == "sigmoid" and E // groups < 2:
            raise ValueError(f"n_group = {groups} leaves groups of one expert, and groups are judged by two; use fewer groups")

    @staticmethod
    def remarks(config: Any) -> list[str]:
        """As Sublayer.remarks."""
        found = []
        if config.num_experts_per_tok == 1 and config.norm_topk_prob:
            found.append(
                "model.num_experts_per_tok = 1 with norm_topk_prob = true gives the chosen expert the weight 1 and the router "
                "no gradient; use model.norm_topk_prob=false"
            )
        if not (config.router_bias and config.router_bias_rate) and not config.router_aux_loss_coef:
            found.append(
                "nothing evens out the loads of the experts; use model.router_bias=true with a model.router_bias_rate above 0, "
                "or model.router_aux_loss_coef"
            )
        return found

    @staticmethod
    def effective(config: Any) -> dict[str, Any]:
        """As Sublayer.effective: what no bias, and no dense layer, is there for."""
        unread = [] if config.router_bias else ["router_bias_rate", "router_bias_step"]
        unread += [] if config.first_k_dense_replace else ["intermediate_size"]
        return dict.fromkeys(unread)

    def forward(self, h_TD: Tensor, rows: int) -> Tensor:
        """As FeedForward.forward."""
        h_TD = self.kit.column_input(h_TD)
        weight_TK, expert_TK = self.gate(h_TD, rows)
        if self.kit.experts.size > 1:
            sent = self.experts.send(h_TD, weight_TK, expert_TK)
            shared_TD = self._shared(h_TD)  # while they travel
            y_TD = self.experts.receive(sent)
        else:
            y_TD, shared_TD = self.experts(h_TD, weight_TK, expert_TK), self._shared(h_TD)
        return self.kit.summed_output(y_TD if shared_TD is None else y_TD + shared_TD)

    def _shared(self, h_TD: Tensor) -> Tensor | None:
        return None if self.shared_experts is None else self.shared_experts.transform(h_TD)

    def matrix_flops(self) -> float:
        """As Sublayer.matrix_flops, of the experts that a token passes."""
        shared = 0.0 if self.shared_experts is None else self.shared_experts.matrix_flops()
        return shared + 2.0 * spec_of(self.gate.weight).elements + 2.0 * self.chosen * self.expert_elements()

    @property
    def routed(self) -> Routed:
        """As FeedForward.routed."""
        shared = 0.0 if self.shared_experts is None else self.shared_experts.matrix_flops()
        return Routed(self.count, self.chosen, self.expert_elements(), shared)

    def expert_elements(self) -> int:
        """Elements of one routed expert, over all tensor-parallel ranks."""
        return sum(spec_of(stack).elements for stack in self.experts.parameters())

    def pointwise_elements(self) -> float:
        """As Sublayer.pointwise_elements: each expert's gate, up and product, and the copies of tokens, made and summed."""
        shared = 0.0 if self.shared_experts is None else self.shared_experts.pointwise_elements()
        return shared + self.chosen * (3 * self.local_width + 4 * self.hidden_size)

    def kept(self, execution: Execution, sequence_length: int) -> Kept:
        """As Sublayer.kept: of each copy of a token gate, silu(gate), up, their product, the same times its weight, and the
        copy itself; compiled, the second and the fourth are recomputed. Selective recomputation in eager mode keeps what
        experts return, too, which no gradient needs. What does not grow with the tokens, such as the router's weight in
        float32, is left out."""
        element, load, compiled = execution.element_bytes, execution.expert_load, execution.compiled
        hidden = load * self.chosen * self.local_width * element
        copies = load * self.chosen * self.hidden_size * element
        inside = (3 if compiled else 5) * hidden
        shared, router = Kept(0, 0), self._kept_by_router(execution)
        if self.shared_experts is not None:
            shared = self.shared_experts.kept(execution, sequence_length)
        everything = shared.everything + router.everything + inside + copies
        products = shared.products + router.products + 2 * hidden
        if not compiled:  # a block counts one result of the mlp: here the shared experts'
            products += copies - (0 if shared.everything else execution.stream(self.hidden_size) * element)
        return Kept(products, everything, inside)

    def _kept_by_router(self, execution: Execution) -> Kept:
        """Scores of all experts; choices, weights and places of the copies; the input in float32, which without shared experts
        is kept in place of the input."""
        config, K, D, compiled = self.gate.config, self.chosen, self.hidden_size, execution.compiled
        wide = 4 * D - (0 if self.shared_experts is not None else execution.element_bytes * D)
        wide = wide if execution.element_bytes == 2 else 0
        scores, weights, places = 4 * self.count, 4 * K, (24 if compiled else 16) * K
        if compiled:
            return Kept(scores + 8 * K, wide + scores + weights + places)
        normed = (4 * K + 4) * config.norm_topk_prob
        groups = (config.n_group * (2 if config.scoring_func == "sigmoid" else 1) + config.topk_group) * (config.n_group > 1)
        logits = (scores + 4) * (config.router_z_loss_coef > 0)
        everything = wide + scores + weights + normed + places + 8 * K + logits
        return Kept(scores + 12 * (K + groups), everything)
