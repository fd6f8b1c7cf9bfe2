"""The output head: logits or loss, and the variants of a head tied to the embedding."""

from typing import Any

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.loss import cross_entropy
from model.parallel.layers import Kit


class Head(nn.Module):
    """From the last hidden state to logits or loss; tied, its weight is the embedding's (Su 2023, kexue.fm/archives/9698)."""

    def __init__(self, config: ModelConfig, kit: Kit, embedding: Any):
        super().__init__()
        self.kit = kit
        self.compiled = False
        """Whether the loss is compiled; see model/loss.py."""
        tied, D = config.tie_word_embeddings, config.hidden_size
        self.swap = tied and config.tied_head == "half-swap"
        self.projection = kit.replicated(D, D) if tied and config.tied_head == "projection" else None
        self.weight: nn.Parameter = (embedding if tied else kit.column(D, config.vocab_size)).weight

    def hidden(self, h_TD: Tensor) -> Tensor:
        """What is multiplied with the rows of the weight: h, swapped or projected, all tokens on every rank."""
        if self.swap:
            h_TD = torch.cat(h_TD.chunk(2, dim=-1)[::-1], dim=-1)
        if self.projection is not None:
            h_TD = self.projection(h_TD)
        return self.kit.column_input(h_TD)

    def forward(self, h_TD: Tensor, targets_T: Tensor | None, rows: int | None = None) -> Any:
        """logits_TV without targets; else the sum of the losses (nats) and the number of scored targets, 0-dim or, with `rows`,
        [rows]: of each of that many equal parts of the tokens."""
        h_TD = self.hidden(h_TD)
        if targets_T is None:
            return self.kit.gather_last(nn.functional.linear(h_TD, self.weight))
        if rows is not None:  # not compiled: code for this shape would then serve training steps too
            parts = zip(h_TD.chunk(rows), targets_T.chunk(rows), strict=True)
            losses = [cross_entropy(h, self.weight, targets, self.kit.group, self.kit.rank) for h, targets in parts]
            return tuple(torch.stack(values) for values in zip(*losses, strict=True))
        return cross_entropy(h_TD, self.weight, targets_T, self.kit.group, self.kit.rank, self.compiled)
