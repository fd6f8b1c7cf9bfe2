"""The network, in the order of the data: embedding, blocks, norm, head.

`x_TD` is the residual stream with T = B * S tokens, batch-major. Under sequence parallelism a rank holds T / tensor-parallel
size of them outside attention and mlp; the kit's layers gather and scatter.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from model.attention.kv_cache import KVCache
from model.attention.row_cache import RowCache
from model.block import TransformerBlock
from model.config import ModelConfig
from model.head import Head, divide_vocabulary
from model.parallel.layers import Kit
from model.parameters import Normal
from model.positions.batch import Positions, TokenLayout, make_positions
from model.positions.config import PositionConfig


class Trunk(nn.Module):
    """Embedding, blocks and final norm (named `model` as Hugging Face names it)."""

    def __init__(self, config: ModelConfig, kit: Kit):
        super().__init__()
        divide_vocabulary(config, kit)
        small = config.tie_word_embeddings and config.tied_head == "small-init"
        initial = Normal(math.log(config.vocab_size) / config.hidden_size) if small else config.initial
        self.embed_tokens = kit.embedding(config.vocab_size, config.hidden_size, initial, config.vocabulary_padding)
        root = torch.tensor(math.sqrt(config.hidden_size), dtype=kit.dtype, device="cpu")
        self.embedding_scale = root.item() if config.scale_embedding else None
        self.layers = nn.ModuleList(TransformerBlock(config, layer, kit) for layer in range(config.num_hidden_layers))
        self.norm = kit.norm(config.hidden_size, config.rms_norm_eps, config.zero_centered_gains)

    def embed(self, tokens_T: Tensor) -> Tensor:
        """x_TD of the first block."""
        x_TD = self.embed_tokens(tokens_T)
        return x_TD if self.embedding_scale is None else x_TD * self.embedding_scale


class Decoder(nn.Module):
    """A decoder-only transformer.

    Args:
        config: sizes and rules.
        position: the position map of training and, unless another is given, of evaluation.
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
        """How a block is called; recomputation and compilation wrap it."""
        self.begin: Callable[[], object] = lambda: None
        """Called first in every forward: from then on CUDA graphs may overwrite the outputs of the pass before."""

    @property
    def blocks(self) -> list[TransformerBlock]:
        """The blocks, first to last."""
        return [*self.model.layers]  # type: ignore[list-item]

    def forward(
        self,
        inputs_BS: Tensor,
        targets_BS: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: KVCache | RowCache | None = None,
        position: PositionConfig | None = None,
        by_row: bool = False,
    ) -> Any:
        """Loss or logits.

        Args:
            inputs_BS: token ids.
            targets_BS: ids to predict, -100 = not scored.
            cu_seqlens: int32 boundaries of documents over the flattened tokens; attention stays inside.
            cache: of earlier tokens, for decoding (kv_cache.py) or for rows in chunks (row_cache.py); this pass is appended.
            position: another map to evaluate with; a cache has its own, and a row cache the documents.
            by_row: with targets, one loss per row.

        Returns:
            With targets, (loss sum in nats, number of scored targets), 0-dim or by row [B], of this rank's tokens; else
            logits_BSV.
        """
        self.begin()
        (B, S), context = inputs_BS.shape, self.kit.context
        if cache is None:
            positions = self.positions_for(self.token_layout(B, S, cu_seqlens), position)
        else:
            positions = cache.positions(B, S, self.model.norm.weight.device, self.model.norm.weight.dtype)
        if self.lm_head.compiled:
            positions.mark_dynamic()
        x_TD = self.model.embed(context.cut(inputs_BS).reshape(-1))
        for layer, block in enumerate(self.model.layers):
            x_TD = self.run_block(block, x_TD, positions, None if cache is None else cache.layers[layer])
        targets_T = None if targets_BS is None else context.cut(targets_BS, fill=-100).reshape(-1)
        result = self.lm_head(self.model.norm(x_TD), targets_T, B if by_row else None)
        if targets_BS is not None:
            return result
        logits = result.view(B, -1, result.shape[-1])
        return logits if context.size == 1 else context.join(logits)[:, :S]

    def token_layout(self, batch: int, sequence: int, cu_seqlens: Tensor | None = None) -> TokenLayout:
        """Which tokens this rank computes of `batch` rows of `sequence` tokens, padded at their ends where context-parallel
        ranks do not divide them."""
        context = self.kit.context
        padded = context.padded(sequence)
        if cu_seqlens is not None and padded != sequence:
            cu_seqlens = cu_seqlens + cu_seqlens // sequence * (padded - sequence)
        return TokenLayout(batch, padded, cu_seqlens, chunks=context.chunks(padded) if context.gathers_keys else ())

    def positions_for(self, tokens: TokenLayout, position: PositionConfig | None = None) -> Positions:
        """Positions of a batch, under the decoder's map or another."""
        weight = self.model.norm.weight
        return make_positions(position or self.position, self.config, tokens, self.trained_length, weight.device, weight.dtype)
