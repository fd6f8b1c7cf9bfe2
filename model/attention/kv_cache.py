"""Keys and values of earlier tokens for decoding, per layer.

    one region        rotated keys and values of every token
    ReRoPE, Leaky     the same bytes per token: values and *far-rotated* keys of every token, and near-rotated keys of the
                      last `window` tokens only, since a key is near for that long and far for ever after
    sliding window    rotated keys and values of the last `sliding_window` tokens only
    MLA               as above with the latent as the value and one shared rotated key: kv_lora_rank + qk_rope_head_dim
                      elements per token

Rows of a batch are aligned at their last token: `starts_B` holds the index of each one's first token.
"""

import torch
from torch import Tensor

from model.attention.heads import AttentionConfig
from model.attention.kernels.inputs import AttentionInputs
from model.attention.sliding_window import LayerPositions
from model.positions.batch import Positions, TokenLayout, make_positions
from model.positions.config import PositionConfig


class _FullBuffer:
    """Vectors of every token, heads first: [B, heads, capacity, size], allocated at the first tokens."""

    def __init__(self, capacity: int):
        self.capacity, self.length = capacity, 0
        self.data: Tensor | None = None

    def extend(self, x: Tensor) -> None:
        """Append [B, heads, S, size]."""
        if self.data is None:
            self.data = x.new_empty(*x.shape[:2], self.capacity, x.shape[-1])
        self.data[:, :, self.length : self.length + x.shape[2]] = x
        self.length += x.shape[2]

    def between(self, start: int, end: int) -> Tensor:
        """Vectors of the tokens [start, end), a view."""
        assert self.data is not None
        return self.data[:, :, start:end]


class _WindowBuffer:
    """Vectors of the last `window` tokens, in order, in a buffer a quarter longer, moved to its start when it is full."""

    def __init__(self, window: int, capacity: int):
        self.window, self.length, self.kept = window, 0, 0
        self.size = min(capacity, window + max(window // 4, 1))
        self.data: Tensor | None = None
        self.recent: Tensor | None = None

    def extend(self, x: Tensor) -> None:
        """Append [B, heads, S, size]."""
        S = x.shape[2]
        if self.data is None:
            self.data = x.new_empty(*x.shape[:2], self.size, x.shape[-1])
        if self.kept + S > self.size:
            merged = torch.cat((self.data[:, :, max(0, self.kept - self.window + 1) : self.kept], x), dim=2)
            self.kept = min(merged.shape[2], self.window)
            self.data[:, :, : self.kept] = merged[:, :, merged.shape[2] - self.kept :]
            self.recent = merged
        else:
            self.data[:, :, self.kept : self.kept + S] = x
            self.kept += S
            self.recent = self.data[:, :, : self.kept]
        self.length += S

    def between(self, start: int, end: int) -> Tensor:
        """Vectors of the tokens [start, end): no more than window - 1 before the last ones appended."""
        assert self.recent is not None
        begin = self.length - self.recent.shape[2]
        assert start >= begin, "a key left the window too early"
        return self.recent[:, :, start - begin : end - begin]


class LayerKVCache:
    """Keys and values of one layer."""

    def __init__(self, layer_positions: LayerPositions, position: PositionConfig, capacity: int, starts_B: Tensor | None):
        self.starts_B, self.length = starts_B, 0
        sliding = layer_positions.sliding_window
        far = position.map.far_region() if layer_positions.takes_far_region else None
        sliding = sliding if sliding and sliding < capacity else None
        self.window = sliding or (far.window if far else None)
        """Distance beyond which a near-rotated key is of no more use; None = never."""
        self.near_k = _FullBuffer(capacity) if self.window is None else _WindowBuffer(self.window, capacity)
        self.far_k = _FullBuffer(capacity) if far else None
        self.v = _WindowBuffer(sliding, capacity) if sliding else _FullBuffer(capacity)

    def extend(self, inputs: AttentionInputs) -> bool:
        """Append the keys and values [B, S, k, size]. Returns whether there were earlier ones."""
        earlier = self.length > 0
        self.near_k.extend(inputs.near_k.transpose(1, 2))
        self.v.extend(inputs.v.transpose(1, 2))
        if self.far_k is not None:
            assert inputs.far_k is not None
            self.far_k.extend(inputs.far_k.transpose(1, 2))
        self.length += inputs.v.shape[1]
        return earlier

    def elements(self) -> int:
        """Elements allocated: for `capacity` tokens, and for the window."""
        buffers = [self.near_k.data, self.v.data, self.far_k.data if self.far_k else None]
        return sum(data.numel() for data in buffers if data is not None)

    def attend(self, inputs: AttentionInputs, scale: float, extra_q: Tensor | None = None) -> Tensor:
        """Attention of the last S tokens over all cached ones, [B, S, n, Hv].

        Args:
            inputs: queries [B, S, n, H] of the tokens appended last.
            scale: multiplies the scores.
            extra_q: [B, S, n, Hv]; its product with the values is added to the scores (absorbed MLA).
        """
        B, S, n, _ = inputs.near_q.shape
        end, start = self.length, self.length - S
        low = 0 if self.window is None else max(0, start - self.window + 1)
        far = self.far_k is not None and inputs.far_q is not None and end > (self.window or 0)
        first = 0 if far else low
        values = self.v.between(first, end)
        i = torch.arange(start, end, device=values.device)[:, None]
        scores = _score(inputs.near_q, self.near_k.between(low, end))
        if far:
            assert self.far_k is not None and self.window is not None and inputs.far_q is not None
            high = end - self.window
            beyond = _score(inputs.far_q, self.far_k.between(0, high))
            near = i - torch.arange(low, high, device=i.device) < self.window
            both = torch.where(near[:, None], scores[..., : high - low], beyond[..., low:])
            scores = torch.cat((beyond[..., :low], both, scores[..., high - low :]), dim=-1)
        if extra_q is not None:
            scores = scores + _score(extra_q, values)
        j = torch.arange(first, end, device=i.device)
        seen = j <= i if far or self.window is None else (j <= i) & (i - j < self.window)
        seen = seen[None, None, :, None]
        if self.starts_B is not None:
            seen = seen & (j >= self.starts_B[:, None])[:, None, None, None]
        wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
        p = (scores.to(wide) * scale).masked_fill(~seen, float("-inf")).softmax(dim=-1).to(values.dtype)
        out = p.flatten(2, 3) @ values
        return out.unflatten(2, (S, -1)).transpose(1, 2).reshape(B, S, n, -1)


def _score(q: Tensor, k: Tensor) -> Tensor:
    """Scores [B, k, S, n / k, keys] of q [B, S, n, H] and k [B, k, keys, H]."""
    q = q.unflatten(2, (k.shape[1], -1)).transpose(1, 2)
    return (q.flatten(2, 3) @ k.transpose(-1, -2)).unflatten(2, q.shape[2:4])


class KVCache:
    """Keys and values of all layers.

    Args:
        config: the network's sizes.
        position: the map to decode with.
        trained_length: tokens the network was trained at.
        batch: rows B.
        capacity: tokens a row can grow to, padding included.
        starts_B: int64 index of each row's first token (rows are padded on the left); None = all begin at 0.
    """

    def __init__(
        self,
        config: AttentionConfig,
        position: PositionConfig,
        trained_length: int,
        batch: int,
        capacity: int,
        starts_B: Tensor | None = None,
    ):
        self.config, self.position, self.trained_length = config, position, trained_length
        self.batch, self.capacity, self.starts_B = batch, capacity, starts_B
        layers = (LayerPositions(config, layer) for layer in range(config.num_hidden_layers))
        self.layers = [LayerKVCache(layer_positions, position, capacity, starts_B) for layer_positions in layers]

    @property
    def length(self) -> int:
        """Tokens held per row, padding included; by the layers that this rank has."""
        return max(layer.length for layer in self.layers)

    def positions(self, B: int, S: int, device: torch.device, dtype: torch.dtype) -> Positions:
        """Positions of the next S tokens of every row.

        Raises:
            ValueError: another batch size, or more tokens than the capacity leaves.
        """
        if self.batch != B:
            raise ValueError(f"the cache was made for {self.batch} rows and got {B}; make one for {B}")
        if self.length + S > self.capacity:
            raise ValueError(
                f"{self.length} cached tokens and {S} more exceed the cache's capacity of {self.capacity}; make it larger"
            )
        padded = self.starts_B if self.length == 0 else None
        cu_seqlens = None if padded is None else _padding_boundaries(padded, S)
        tokens = TokenLayout(B, S, cu_seqlens, offset=self.length, starts_B=self.starts_B)
        return make_positions(self.position, self.config, tokens, self.trained_length, device, dtype)


def _padding_boundaries(starts_B: Tensor, S: int) -> Tensor:
    """Document boundaries that keep each row's padding apart from its tokens."""
    rows = torch.arange(len(starts_B), device=starts_B.device) * S
    ends = torch.tensor([len(starts_B) * S], device=starts_B.device)
    return torch.cat((rows, rows + starts_B, ends)).unique().to(torch.int32)
