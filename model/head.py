"""The output head: logits or loss, and the variants of a head tied to the embedding."""

from typing import Any

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.loss import chunk_tokens, cross_entropy
from model.parallel.layers import Kit
from model.parameters import Orthogonal
from model.sublayer import Execution


def divide_vocabulary(config: ModelConfig, kit: Kit) -> int:
    """A rank's rows of the embedding and the head.

    Raises:
        ValueError: the ranks do not divide them.
    """
    multiple, padding = config.pad_vocab_to_multiple, config.vocabulary_padding
    key = f"vocab_size (padded to a multiple of {multiple})" if padding else "vocab_size"
    advice = f"set model.pad_vocab_to_multiple to a multiple of {kit.size}"
    return kit.divide(key, config.vocab_size + padding, advice)


class Head(nn.Module):
    """From the last hidden state to logits or loss; tied, its weight is the embedding's (Su 2023, kexue.fm/archives/9698)."""

    def __init__(self, config: ModelConfig, kit: Kit, embedding: Any):
        super().__init__()
        self.kit = kit
        self.compiled = False
        """Whether the loss is compiled; see model/loss.py."""
        tied, D = config.tie_word_embeddings, config.hidden_size
        self.swap = tied and config.tied_head == "half-swap"
        projected = tied and config.tied_head == "projection"
        self.projection = kit.replicated(D, D, Orthogonal(D), "head") if projected else None
        padding = config.vocabulary_padding
        rows = embedding if tied else kit.column(D, config.vocab_size, config.initial, "head", padding=padding)
        self.weight: nn.Parameter = rows.weight
        self.hidden_size, self.vocab_size, self.rows = D, config.vocab_size, config.vocab_size + padding

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
            return self.kit.gather_last(nn.functional.linear(h_TD, self.weight))[:, : self.vocab_size]
        if rows is not None:  # not compiled: code for this shape would then serve training steps too
            parts = zip(h_TD.chunk(rows), targets_T.chunk(rows), strict=True)
            losses = [self._loss(h, targets) for h, targets in parts]
            return tuple(torch.stack(values) for values in zip(*losses, strict=True))
        return self._loss(h_TD, targets_T, self.compiled)

    def _loss(self, h_TD: Tensor, targets_T: Tensor, compiled: bool = False) -> tuple[Tensor, Tensor]:
        return cross_entropy(h_TD, self.weight, targets_T, self.kit.group, self.kit.rank, compiled, self.vocab_size)

    def matrix_flops(self) -> float:
        """Forward FLOPs per token in matrix products, over all ranks: 2 per weight, of a tied embedding too; padding is no work
        of the network and is not counted."""
        projected = self.hidden_size if self.projection is not None else 0
        return 2.0 * self.hidden_size * (self.vocab_size + projected)

    def loss_bytes(self, tokens: int, execution: Execution) -> int:
        """Bytes on top during the loss of `tokens` tokens: a chunk of logits with its gradient, the gradient of the head (one
        chunk needs no float32 sum) and of the states."""
        element, size = execution.element_bytes, self.kit.size
        vocabulary, compiled = self.rows // size, execution.compiled and size == 1
        rows = chunk_tokens(execution.device, vocabulary, tokens, compiled)
        logit = 2 * element if compiled and execution.device == "cuda" else 4 + (element if element < 4 else 0)
        head = vocabulary * self.hidden_size * (element if rows == tokens else 4 + element)
        return rows * vocabulary * logit + head + tokens * self.hidden_size * element

    def loss_traffic(self) -> float:
        """Bytes per token that the loss moves on a rank, forward and backward."""
        return 16 * self.rows / self.kit.size
