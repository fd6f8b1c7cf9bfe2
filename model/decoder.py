"""The network, in the order of the data: embedding, blocks, norm, head.

`x_TD` is the residual stream with T = B * S tokens, batch-major. Under sequence parallelism a rank holds T / tensor-parallel
size of them outside attention and mlp; the kit's layers gather and scatter. A pipeline-parallel rank has the parts of its own
stages only (model/parallel/pipeline.py); what it runs begins with the stream of the stage before.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from model.attention.kv_cache import KVCache
from model.attention.row_cache import RowCache
from model.block import TransformerBlock
from model.config import ModelConfig
from model.feed_forward.moe import MixtureOfExperts
from model.feed_forward.router import Router, router_bias_name
from model.head import Head, divide_vocabulary
from model.parallel.layers import Kit
from model.parameters import Normal
from model.positions.batch import Positions, TokenLayout, make_positions
from model.positions.config import PositionConfig


class Blocks(nn.Module):
    """The blocks of this rank, under their numbers in the whole network."""

    def __init__(self, config: ModelConfig, kit: Kit):
        super().__init__()
        for stage in kit.pipeline.own:
            for layer in kit.pipeline.layers(stage, config.num_hidden_layers):
                self.add_module(str(layer), TransformerBlock(config, layer, kit))

    def __getitem__(self, layer: int) -> TransformerBlock:
        return self._modules[str(layer)]  # type: ignore[return-value]

    def __iter__(self) -> Iterator[TransformerBlock]:
        return iter(self.children())  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self._modules)


class Trunk(nn.Module):
    """Embedding, blocks and final norm (named `model` as Hugging Face names it)."""

    def __init__(self, config: ModelConfig, kit: Kit):
        super().__init__()
        divide_vocabulary(config, kit)
        pipeline = kit.pipeline
        if pipeline.is_first or (pipeline.is_last and config.tie_word_embeddings):
            small = config.tie_word_embeddings and config.tied_head == "small-init"
            initial = Normal(math.log(config.vocab_size) / config.hidden_size) if small else config.initial
            self.embed_tokens = kit.embedding(config.vocab_size, config.hidden_size, initial, config.vocabulary_padding)
        root = torch.tensor(math.sqrt(config.hidden_size), dtype=kit.dtype, device="cpu")
        self.embedding_scale = root.item() if config.scale_embedding else None
        self.layers = Blocks(config, kit)
        if pipeline.is_last:
            self.norm = kit.norm(config.hidden_size, config.rms_norm_eps, config.zero_centered_gains)

    def embed(self, tokens_T: Tensor) -> Tensor:
        """x_TD of the first block."""
        x_TD = self.embed_tokens(tokens_T)
        return x_TD if self.embedding_scale is None else x_TD * self.embedding_scale


class Decoder(nn.Module):
    """A decoder-only transformer, or the stages of it that a pipeline-parallel rank has.

    Args:
        config: sizes and rules.
        position: the position map of training and, unless another is given, of evaluation.
        trained_length: training length in tokens, for log n and YaRN.
        kit: layers of one device or of a tensor-parallel group, and which of them this rank has.
    """

    def __init__(self, config: ModelConfig, position: PositionConfig, trained_length: int, kit: Kit):
        super().__init__()
        self.config, self.position, self.kit = config, position, kit
        self.trained_length = position.trained_length or trained_length
        self.model = Trunk(config, kit)
        self.lm_head = Head(config, kit, getattr(self.model, "embed_tokens", None)) if kit.pipeline.is_last else None
        self.compiled = False
        """Whether `run_block` is compiled."""
        self.run_block: Callable[..., Tensor] = lambda block, *inputs: block(*inputs)
        """How a block is called; recomputation and compilation wrap it."""
        self.begin: Callable[[], object] = lambda: None
        """Called first in every forward: from then on CUDA graphs may overwrite the outputs of the pass before."""

    @property
    def blocks(self) -> list[TransformerBlock]:
        """The blocks of this rank, first to last."""
        return [*self.model.layers]

    @property
    def head(self) -> Head:
        """The output head, of a rank that has it."""
        assert self.lm_head is not None, "the last stage has the head"
        return self.lm_head

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.parameters()).dtype

    @property
    def tied_copy(self) -> nn.Parameter | None:
        """The last stage's copy of a tied embedding, which the first stage owns; None elsewhere."""
        pipeline = self.kit.pipeline
        copied = self.config.tie_word_embeddings and pipeline.is_last and not pipeline.is_first
        return self.model.embed_tokens.weight if copied else None

    def routers(self) -> dict[int, Router]:
        """Those of this rank's layers with experts, by the layer's number."""
        layers = {block.layer: block.mlp for block in self.blocks}
        return {layer: mlp.gate for layer, mlp in layers.items() if isinstance(mlp, MixtureOfExperts)}

    def router_biases(self) -> dict[str, Tensor]:
        """By name, the biases of this rank's routers that have one: float32, no parameters, and in checkpoints all the same."""
        routers = self.routers().items() if self.config.router_bias else ()
        return {router_bias_name(layer): router.bias_E.detach() for layer, router in routers}

    def set_loss_scale(self, scale: Tensor | float) -> None:
        """Say what the loss of the next forward will be multiplied by before its backward; layers add losses of their own."""
        self.kit.loss_scale.fill_(scale)

    def owned_parameters(self) -> dict[str, nn.Parameter]:
        """By name, all that this rank has but the copy of a tied embedding: over the stages each parameter once."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter is not self.tied_copy}

    def forward(
        self,
        inputs_BS: Tensor,
        targets_BS: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: KVCache | RowCache | None = None,
        position: PositionConfig | None = None,
        by_row: bool = False,
    ) -> Any:
        """Loss or logits, through all stages; all pipeline-parallel ranks call it alike, and gradients end where a stage does
        (trainer/engines/pipeline.py trains them).

        Args:
            inputs_BS: token ids.
            targets_BS: ids to predict, -100 = not scored.
            cu_seqlens: int32 boundaries of documents over the flattened tokens; attention stays inside.
            cache: of earlier tokens, for decoding (kv_cache.py) or for rows in chunks (row_cache.py); this pass is appended.
            position: another map to evaluate with; a cache has its own, and a row cache the documents.
            by_row: with targets, one loss per row.

        Returns:
            With targets, (loss sum in nats, number of scored targets), 0-dim or by row [B], of this rank's tokens, zeros where
            another rank has the last stage; else logits_BSV, on all ranks.
        """
        self.begin()
        B, S = inputs_BS.shape
        if cache is None:
            positions = self.positions_for(self.token_layout(B, S, cu_seqlens), position)
        else:
            positions = cache.positions(B, S, self.device, self.dtype)
        x_TD = self.run_stages(inputs_BS, positions, self.run_block, cache)
        if targets_BS is None:
            return self._logits(x_TD, B, S)
        if self.kit.pipeline.is_last:
            return self.loss(x_TD, targets_BS, by_row)
        return torch.zeros((2, B) if by_row else 2, device=self.device).unbind()

    def run_stages(
        self, inputs_BS: Tensor, positions: Positions, run_block: Callable[..., Tensor], cache: KVCache | RowCache | None = None
    ) -> Tensor:
        """The stream behind the last of this rank's blocks, each called by `run_block`, in a pass through all stages."""
        pipeline, (B, S), x_TD = self.kit.pipeline, inputs_BS.shape, None
        for stage in pipeline.own:
            if stage:
                x_TD = pipeline.receive(self.empty_stream(B, S), stage - 1)
            x_TD = self.run_stage(stage, inputs_BS, x_TD, positions, run_block, cache)
            if stage + 1 < pipeline.stages:
                pipeline.send(x_TD, stage + 1)
        assert x_TD is not None, "every rank has a stage"
        return x_TD

    def run_stage(
        self,
        stage: int,
        inputs_BS: Tensor,
        x_TD: Tensor | None,
        positions: Positions,
        run_block: Callable[..., Tensor],
        cache: KVCache | RowCache | None = None,
    ) -> Tensor:
        """The stream behind the blocks of one of this rank's stages.

        Args:
            inputs_BS: token ids, which the first stage embeds.
            x_TD: the stream behind the stage before; None for the first.
            run_block: gives the stream behind a block from the block, the stream before it, positions and its cache.
        """
        if self.compiled:
            positions.mark_dynamic()
        if stage == 0:
            x_TD = self.model.embed(self.kit.context.cut(inputs_BS).reshape(-1))
        for layer in self.kit.pipeline.layers(stage, self.config.num_hidden_layers):
            x_TD = run_block(self.model.layers[layer], x_TD, positions, None if cache is None else cache.layers[layer])
        assert x_TD is not None, "a stage but the first is given a stream"
        return x_TD

    def loss(self, x_TD: Tensor, targets_BS: Tensor, by_row: bool = False) -> tuple[Tensor, Tensor]:
        """Of the stream behind the last block: loss sum in nats and number of scored targets, as forward."""
        targets_T = self.kit.context.cut(targets_BS, fill=-100).reshape(-1)
        return self.head(self.model.norm(x_TD), targets_T, len(targets_BS) if by_row else None)

    def _logits(self, x_TD: Tensor, batch: int, sequence: int) -> Tensor:
        """logits_BSV on all ranks from the stream behind this rank's blocks."""
        context, pipeline = self.kit.context, self.kit.pipeline
        if pipeline.is_last:
            logits = self.head(self.model.norm(x_TD), None)
            logits = logits.view(batch, -1, logits.shape[-1])
            if pipeline.is_first:
                return logits if context.size == 1 else context.join(logits)[:, :sequence]
        else:
            own = context.padded(sequence) // context.size
            logits = torch.empty(batch, own, self.config.vocab_size, dtype=self.dtype, device=self.device)
        logits = pipeline.from_last(logits.contiguous())
        return logits if context.size == 1 else context.join(logits)[:, :sequence]

    def empty_stream(self, batch: int, sequence: int, device: torch.device | None = None) -> Tensor:
        """An uninitialised x_TD of this rank, of `batch` rows of `sequence` tokens."""
        context = self.kit.context
        tokens = self.kit.stream_tokens(batch * context.padded(sequence) // context.size)
        return torch.empty(tokens, self.config.hidden_size, dtype=self.dtype, device=device or self.device)

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
        return make_positions(position or self.position, self.config, tokens, self.trained_length, self.device, self.dtype)
