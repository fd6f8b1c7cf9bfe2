"""A network of three weights with a tied or untied head, for tests of engines that need no transformer."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, embedding, linear

from model.config import ModelConfig
from model.parameters import ONES, ParameterSpec, set_spec

VOCABULARY, WIDTH = 24, 8


@dataclass
class Batch:
    """A micro-batch, as data/corpus/stream.py gives it."""

    inputs_BS: Tensor
    targets_BS: Tensor
    cu_seqlens: Tensor | None = None


class Tiny(nn.Module):
    """head(gain * tanh(x W)) with x the embedding; `poison` multiplies the loss of the next calls, one after another."""

    def __init__(self, tied: bool, dtype: torch.dtype, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> nn.Parameter:
            return nn.Parameter((torch.randn(shape, generator=generator, dtype=torch.float64) * 0.2).to(dtype))

        self.embed, self.matrix = draw(VOCABULARY, WIDTH), draw(WIDTH, WIDTH)
        self.gain = nn.Parameter(torch.ones(WIDTH, dtype=dtype))
        self.head = self.embed if tied else draw(VOCABULARY, WIDTH)
        set_spec(self.embed, ParameterSpec("embedding", (VOCABULARY, WIDTH), None))
        set_spec(self.matrix, ParameterSpec("matrix", (WIDTH, WIDTH), None))
        set_spec(self.gain, ParameterSpec("gain", (WIDTH,), None, ONES))
        if not tied:
            set_spec(self.head, ParameterSpec("matrix", (VOCABULARY, WIDTH), None))
        self.config = ModelConfig(vocab_size=VOCABULARY)
        self.poison: list[float] = []

    def owned_parameters(self) -> dict[str, nn.Parameter]:
        """As the decoder's."""
        return dict(self.named_parameters())

    def set_loss_scale(self, scale: Tensor) -> None:
        """No layer adds to the loss."""

    def forward(self, inputs_BS: Tensor, targets_BS: Tensor, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Sum of losses and number of scored targets."""
        h = self.gain * torch.tanh(linear(embedding(inputs_BS, self.embed), self.matrix))
        logits = linear(h, self.head).flatten(0, 1)
        loss = cross_entropy(
            logits.float() if logits.dtype == torch.bfloat16 else logits, targets_BS.flatten(), reduction="sum"
        )
        return loss * (self.poison.pop(0) if self.poison else 1.0), (targets_BS >= 0).sum()


def sequences(step: int, rows: int = 4, length: int = 6, ids: int = VOCABULARY) -> Batch:
    """Random ids below `ids`; row r leaves r targets unscored."""
    drawn = torch.randint(0, ids, (rows, length + 1), generator=torch.Generator().manual_seed(step))
    targets = drawn[:, 1:].clone()
    for row in range(rows):
        targets[row, :row] = -100
    return Batch(drawn[:, :-1], targets)


def split(whole: Batch, parts: int) -> list[Batch]:
    """Equal runs of rows."""
    return [Batch(i, t) for i, t in zip(whole.inputs_BS.chunk(parts), whole.targets_BS.chunk(parts), strict=True)]
