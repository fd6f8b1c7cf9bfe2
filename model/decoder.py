"""The network, in the order of the data: embedding, blocks, norm, head.

`x_TD` is the residual stream with T = B * S tokens, batch-major. Under sequence parallelism a rank holds T / tensor
ranks of them between the blocks' halves; the kit's layers gather and scatter.
"""

import math
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from model.attention import attention
from model.cache import Cache, LayerCache
from model.config import ModelConfig, PositionConfig
from model.layers import Kit, Logical, full_slice
from model.loss import cross_entropy
from model.positions import Reading, reading


class Mlp(nn.Module):
    """SwiGLU (Shazeer, 2020): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, kit: Kit):
        super().__init__()
        self.kit = kit
        self.gate_proj = kit.column(config.hidden_size, config.intermediate_size)
        self.up_proj = kit.column(config.hidden_size, config.intermediate_size)
        self.down_proj = kit.row(config.intermediate_size, config.hidden_size)

    def forward(self, h_TD: Tensor) -> Tensor:
        """y_TD."""
        h_TD = self.kit.enter(h_TD)
        return self.down_proj(silu(self.gate_proj(h_TD)) * self.up_proj(h_TD))


class Block(nn.Module):
    """Pre-norm attention and mlp, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int, kit: Kit):
        super().__init__()
        self.input_layernorm = kit.norm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = attention(config, layer, kit)
        self.post_attention_layernorm = kit.norm(config.hidden_size, config.rms_norm_eps)
        self.mlp = Mlp(config, kit)

    def forward(self, x_TD: Tensor, reading: Reading, cache: LayerCache | None = None) -> Tensor:
        """x_TD of the next block. `cache` is this layer's, when decoding."""
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), reading, cache)
        return x_TD + self.mlp(self.post_attention_layernorm(x_TD))


class Trunk(nn.Module):
    """Embedding, blocks and final norm (named `model` as Hugging Face names it)."""

    def __init__(self, config: ModelConfig, kit: Kit):
        super().__init__()
        self.embed_tokens = kit.embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer, kit) for layer in range(config.num_hidden_layers))
        self.norm = kit.norm(config.hidden_size, config.rms_norm_eps)


class Head(nn.Module):
    """From the last hidden state to logits or loss; the weight may be the embedding's own."""

    def __init__(self, config: ModelConfig, kit: Kit, embedding: Any):
        super().__init__()
        self.kit = kit
        self.compiled = False
        """Whether the loss is compiled; see model/loss.py."""
        tied, how = config.tie_word_embeddings, config.tied_head
        self.swap = tied and how == "half-swap"
        self.projection = kit.replicated(config.hidden_size, config.hidden_size) if tied and how == "projection" else None
        self.weight: nn.Parameter = (embedding if tied else kit.column(config.hidden_size, config.vocab_size)).weight

    def hidden(self, h_TD: Tensor) -> Tensor:
        """What meets the rows of the weight, full tokens on every rank (kexue 9698)."""
        if self.swap:
            h_TD = torch.cat(h_TD.chunk(2, dim=-1)[::-1], dim=-1)
        if self.projection is not None:
            h_TD = self.projection(h_TD)
        return self.kit.enter(h_TD)

    def forward(self, h_TD: Tensor, targets_T: Tensor | None, rows: int | None = None) -> Any:
        """Logits_TV without targets; else (sum of the losses in nats, number of scored targets), of each of `rows` if given."""
        h_TD = self.hidden(h_TD)
        if targets_T is None:
            return self.kit.gather(nn.functional.linear(h_TD, self.weight))
        if rows is not None:  # not compiled: code for this shape would then serve training steps too
            parts = zip(h_TD.chunk(rows), targets_T.chunk(rows), strict=True)
            found = [cross_entropy(h, self.weight, targets, self.kit.group, self.kit.rank) for h, targets in parts]
            return tuple(torch.stack(values) for values in zip(*found, strict=True))
        return cross_entropy(h_TD, self.weight, targets_T, self.kit.group, self.kit.rank, self.compiled)


class Decoder(nn.Module):
    """A decoder-only transformer.

    Args:
        config: sizes and rules.
        position: the map it is trained and, unless told otherwise, read with.
        trained_length: training length in tokens, for log n and YaRN.
        kit: layers of one device or of a tensor-parallel group.
    """

    def __init__(self, config: ModelConfig, position: PositionConfig, trained_length: int, kit: Kit):
        super().__init__()
        self.config, self.position, self.kit = config, position, kit
        self.trained_length = position.trained_length or trained_length
        self.model = Trunk(config, kit)
        self.lm_head = Head(config, kit, self.model.embed_tokens)
        self.run_block: Callable[..., Tensor] = lambda block, *inputs: block(*inputs)
        """How a block is called; recomputation and compilation wrap it from outside."""
        self.begin: Callable[[], object] = lambda: None
        """Called first in every forward: what CUDA graphs made in the pass before may then be overwritten."""

    def forward(
        self,
        inputs_BS: Tensor,
        targets_BS: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: Cache | None = None,
        position: PositionConfig | None = None,
        by_row: bool = False,
    ) -> Any:
        """Loss or logits.

        Args:
            inputs_BS: token ids.
            targets_BS: ids to predict, -100 = not scored.
            cu_seqlens: int32 boundaries of documents over the flattened tokens; attention stays inside.
            cache: keys and values of earlier tokens (model/cache.py); grown by these.
            position: another map to read with; a cache has its own.
            by_row: with targets, the losses of each row apart.

        Returns:
            (loss_sum, target_count), 0-dim tensors of this rank's batch in nats, or [B] by row, with targets; else logits_BSV.
        """
        self.begin()
        B, S = inputs_BS.shape
        if cache is None:
            how = self.read(B, S, cu_seqlens, position)
        else:
            how = cache.reading(B, S, self.model.norm.weight.device, self.model.norm.weight.dtype)
        if self.lm_head.compiled and how.documents is not None:
            how.documents.vary()
        x_TD = self.model.embed_tokens(inputs_BS.reshape(-1))
        for layer, block in enumerate(self.model.layers):
            x_TD = self.run_block(block, x_TD, how, None if cache is None else cache.layers[layer])
        targets_T = None if targets_BS is None else targets_BS.reshape(-1)
        result = self.lm_head(self.model.norm(x_TD), targets_T, B if by_row else None)
        return result.view(B, S, -1) if targets_BS is None else result

    def read(self, B: int, S: int, cu_seqlens: Tensor | None = None, position: PositionConfig | None = None) -> Reading:
        """Positions of a batch of B sequences of S tokens."""
        weight = self.model.norm.weight
        return reading(
            position or self.position, self.config, B, S, cu_seqlens,
            device=weight.device, dtype=weight.dtype, trained_length=self.trained_length,
        )  # fmt: skip


def initial_std(config: ModelConfig, name: str) -> float:
    """Standard deviation a matrix starts with; NaN for one that starts orthogonal."""
    sigma = config.initializer_range
    if name.endswith("projection.weight"):
        return math.nan
    if name == "model.embed_tokens.weight" and config.tie_word_embeddings and config.tied_head == "small-init":
        return math.log(config.vocab_size) / config.hidden_size
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        match config.residual_init:
            case "scaled":
                return _scaled_std(config)
            case "plain":
                return sigma
            case "zero":
                return 0.0
    return sigma


def _scaled_std(config: ModelConfig) -> float:
    """Of a residual branch's last matrix, so that the sum of all branches keeps its size."""
    return config.initializer_range / math.sqrt(2 * config.num_hidden_layers)


FLOOR_SHARE = 0.1
"""Tiger's least RMS of a tensor, relative to the deviation it starts with: it moves zeros, and nothing that was drawn."""


def rms_floors(model: "Decoder", fixed: float | None = None) -> dict[str, float]:
    """Least RMS with which Tiger scales the rate of each parameter, by name.

    A tensor of zeros counts as drawn with `residual_init = "scaled"`; an orthogonal projection has RMS 1 / sqrt(hidden_size).

    Args:
        fixed: one number for all tensors instead (optimizer.rms_floor); None = a tenth of the initial deviation of each.
    """
    config = model.config

    def start(name: str) -> float:
        std = initial_std(config, name)
        return 1.0 / math.sqrt(config.hidden_size) if math.isnan(std) else std or _scaled_std(config)

    return {name: fixed or FLOOR_SHARE * start(name) for name, _ in model.named_parameters()}


@torch.no_grad()
def initialise(model: Decoder, seed: int, parameters: Iterator[tuple[str, nn.Parameter]] | None = None) -> None:
    """Draw every weight: the full tensor from a generator of its own name, then this rank's slice of it.

    So the weights depend on the seed and the kind of device, not on the tensor-parallel size or the order of drawing.
    """
    for name, parameter in parameters or model.named_parameters():
        logical: Logical = parameter.logical  # type: ignore[attr-defined]
        if logical.kind in ("gain", "bias"):
            parameter.fill_(1.0 if logical.kind == "gain" else 0.0)
            continue
        full = draw(logical.shape, initial_std(model.config, name), seed, name, parameter.device)
        shape, start = full_slice(logical, model.kit.size, model.kit.rank)
        for dimension, (length, offset) in enumerate(zip(shape, start, strict=True)):
            full = full.narrow(dimension, offset, length)
        parameter.copy_(full)


def draw(shape: tuple[int, ...], std: float, seed: int, name: str, device: torch.device) -> Tensor:
    """One full float32 tensor: normal with deviation `std`, or orthogonal for NaN."""
    # 32 bits: the CPU's Mersenne twister ignores the rest of a seed
    generator = torch.Generator(device).manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    normal = torch.randn(shape, generator=generator, device=device)
    return torch.linalg.qr(normal)[0] if math.isnan(std) else normal.mul_(std)
