"""A tied embedding whose two uses lie on different stages of a pipeline: one rank owns it, another one has a copy.

The first stage owns the weight, updates it, counts it in norms and saves it; the last stage multiplies with its copy. Once per
update the owner takes the gradient of the copy, and gives the new weight back.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.decoder import Decoder
from model.parallel.mesh import Mesh


class TiedEmbedding:
    """The two weights, on ranks with the first and the last stage; nothing on other ranks, or without a tied embedding.

    Args:
        model: the stages of a rank.
    """

    def __init__(self, model: Decoder, mesh: Mesh):
        self._ends = mesh.ends
        shared = model.config.tie_word_embeddings and mesh.ends.size > 1
        self.copy: nn.Parameter | None = model.tied_copy
        """On the last stage."""
        self.owned: nn.Parameter | None = model.model.embed_tokens.weight if shared and self.copy is None else None
        """On the first stage."""

    def collect(self, gradient: Tensor | None) -> Tensor | None:
        """The gradient of the copy, on the owner's rank; None elsewhere. Both ranks call it.

        Args:
            gradient: of the copy, float32 and contiguous; None but on its rank.
        """
        if gradient is not None:
            dist.send(gradient, group=self._ends.group, group_dst=0)
        if self.owned is None:
            return None
        received = torch.empty_like(self.owned.data, dtype=torch.float32)
        dist.recv(received, group=self._ends.group, group_src=1)
        return received

    def share(self) -> None:
        """Copy the owner's weight. Both ranks call it."""
        weight = self.copy if self.owned is None else self.owned
        if weight is not None:
            dist.broadcast(weight.data, group=self._ends.group, group_src=0)
