"""Loads of the experts in a step, and the biases that follow them (model/feed_forward/router.py says what they are for).

The loads are sums over all tokens of an update: of its micro-batches, and of all ranks that see different tokens. So the biases
do not depend on how a batch is cut.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.decoder import Decoder
from model.parallel.mesh import Mesh
from trainer.checkpoint.rectangles import Shard


@dataclass(frozen=True)
class StepLoads:
    """What the backwards of a step have shown, alike on all ranks."""

    layers: tuple[int, ...] = ()
    """Numbers of the layers with experts."""
    token_LE: Tensor | None = None
    """Tokens that went to each expert of these, float32 on the device; None in a network without experts."""

    @property
    def largest_share(self) -> Tensor | None:
        """The largest share of a layer's choices that one expert has, over that of even loads: 1 is even. 0-dim."""
        if self.token_LE is None:
            return None
        return (self.token_LE.max(1).values / self.token_LE.mean(1).clamp(min=1e-9)).max()


NO_LOADS = StepLoads()


class ExpertBalance:
    """The loads of every layer in a step, and the step of its biases.

    Args:
        model: the decoder, or the stages of it that this rank has.
        mesh: tokens are split over its replicas, layers over its pipeline.
    """

    def __init__(self, model: Any, mesh: Mesh):
        self._mesh, self._model = mesh, model
        self._routers = model.routers() if isinstance(model, Decoder) else {}
        self._layers = model.config.layers_with_experts if isinstance(model, Decoder) else ()

    def begin(self) -> None:
        """A step begins: forget the loads."""
        for router in self._routers.values():
            router.bias_E.grad = None

    @torch.no_grad()
    def finish(self) -> StepLoads:
        """What the step's micro-batches on all ranks have shown; all ranks call it."""
        if not self._layers:
            return StepLoads()
        experts = self._model.config.n_routed_experts
        token_LE = torch.zeros(len(self._layers), experts, device=self._mesh.device)
        for layer, router in self._routers.items():
            if router.bias_E.grad is not None:
                token_LE[self._layers.index(layer)] = router.bias_E.grad
        return StepLoads(self._layers, self._mesh.pipeline.sum(self._mesh.replicas.sum(token_LE)))

    @torch.no_grad()
    def update(self, loads: StepLoads, skipped: Tensor) -> None:
        """Move the biases against the loads, unless the weights did not move."""
        for layer, router in self._routers.items():
            config = router.config
            if not config.router_bias or not config.router_bias_rate or loads.token_LE is None:
                continue
            load_E = loads.token_LE[self._layers.index(layer)]
            above_E = load_E - load_E.mean()
            if config.router_bias_step == "sign":
                step_E = above_E.sign()
            else:
                step_E = above_E / above_E.square().mean().sqrt().clamp(min=1e-9)
            kept = ~skipped.to(step_E.device)
            router.bias_E.sub_(torch.where(kept, config.router_bias_rate * step_E, 0.0))

    def shards(self) -> list[Shard]:
        """The biases, for the checkpoint, as weights beside those of the router."""
        stage = self._mesh.stage
        return [
            Shard(
                f"weight/{name}", tuple(bias.shape), tuple(bias.shape), (0,), 0, bias, (stage.rank, stage.size), "update"
            )
            for name, bias in (self._model.router_biases() if self._routers else {}).items()
        ]  # fmt: skip
