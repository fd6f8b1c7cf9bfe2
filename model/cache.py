"""What decoding keeps of earlier tokens, per layer and kind.

    one region        rotated keys and values of every token
    ReRoPE, Leaky     the same bytes a token: values and *far-rotated* keys of every token, and near-rotated keys of the
                      last `window` tokens only, since a key is near for that long and far for ever after
    sliding window    rotated keys and values of the last `sliding_window` tokens only
    MLA               as above with the latent as the value and one shared rotated key: kv_lora_rank + qk_rope_head_dim
                      numbers a token

Rows of a batch are aligned at their last token: `starts_B` says where each one begins.
"""

import torch
from torch import Tensor

from model.config import ModelConfig, PositionConfig
from model.heads import Heads
from model.pattern import Place
from model.positions import Reading, has_window, reading


class _All:
    """Every token's vectors, heads first: [B, heads, capacity, size], made at the first tokens."""

    def __init__(self, capacity: int):
        self.capacity, self.length = capacity, 0
        self.store: Tensor | None = None

    def extend(self, x: Tensor) -> None:
        """Append [B, heads, S, size]."""
        if self.store is None:
            self.store = x.new_empty(*x.shape[:2], self.capacity, x.shape[-1])
        self.store[:, :, self.length : self.length + x.shape[2]] = x
        self.length += x.shape[2]

    def between(self, start: int, end: int) -> Tensor:
        """Vectors of the tokens [start, end), a view."""
        assert self.store is not None
        return self.store[:, :, start:end]


class _Recent:
    """The vectors of the last `window` tokens, in order, in a buffer a quarter longer that is moved up when it is full."""

    def __init__(self, window: int, capacity: int):
        self.window, self.length, self.kept = window, 0, 0
        self.size = min(capacity, window + max(window // 4, 1))
        self.store: Tensor | None = None
        self.last: Tensor | None = None

    def extend(self, x: Tensor) -> None:
        """Append [B, heads, S, size]."""
        S = x.shape[2]
        if self.store is None:
            self.store = x.new_empty(*x.shape[:2], self.size, x.shape[-1])
        if self.kept + S > self.size:
            joined = torch.cat((self.store[:, :, max(0, self.kept - self.window + 1) : self.kept], x), dim=2)
            self.kept = min(joined.shape[2], self.window)
            self.store[:, :, : self.kept] = joined[:, :, joined.shape[2] - self.kept :]
            self.last = joined
        else:
            self.store[:, :, self.kept : self.kept + S] = x
            self.kept += S
            self.last = self.store[:, :, : self.kept]
        self.length += S

    def between(self, start: int, end: int) -> Tensor:
        """Vectors of the tokens [start, end): no more than window - 1 before the last ones appended."""
        assert self.last is not None
        begin = self.length - self.last.shape[2]
        assert start >= begin, "a key left the window too early"
        return self.last[:, :, start - begin : end - begin]


class LayerCache:
    """Keys and values of one layer."""

    def __init__(self, place: Place, position: PositionConfig, capacity: int, starts_B: Tensor | None):
        self.starts_B, self.length = starts_B, 0
        sliding = place.sliding_window if place.sliding_window and place.sliding_window < capacity else None
        two = place.turns and place.sliding_window is None and has_window(position)
        self.window = sliding or (position.window if two else None)
        """Distance beyond which a near-rotated key is of no more use; None = never."""
        self.near_k = _All(capacity) if self.window is None else _Recent(self.window, capacity)
        self.far_k = _All(capacity) if two else None
        self.v = _Recent(sliding, capacity) if sliding else _All(capacity)

    def extend(self, heads: Heads) -> bool:
        """Append the keys and values [B, S, k, size]; say whether there were earlier ones."""
        earlier = self.length > 0
        self.near_k.extend(heads.near_k.transpose(1, 2))
        self.v.extend(heads.v.transpose(1, 2))
        if self.far_k is not None:
            assert heads.far_k is not None
            self.far_k.extend(heads.far_k.transpose(1, 2))
        self.length += heads.v.shape[1]
        return earlier

    def numbers(self) -> int:
        """Numbers held: of every token that there is room for, and of the window."""
        stores = [self.near_k.store, self.v.store, self.far_k.store if self.far_k else None]
        return sum(store.numel() for store in stores if store is not None)

    def attend(self, heads: Heads, scale: float, extra_q: Tensor | None = None) -> Tensor:
        """Attention of the last S tokens over all cached ones, [B, S, n, Hv].

        Args:
            heads: queries [B, S, n, H] of the tokens appended last.
            scale: multiplies the scores.
            extra_q: [B, S, n, Hv]; its product with the values is added to the scores (absorbed MLA).
        """
        B, S, n, _ = heads.near_q.shape
        end, start = self.length, self.length - S
        low = 0 if self.window is None else max(0, start - self.window + 1)
        far = self.far_k is not None and heads.far_q is not None and end > (self.window or 0)
        first = 0 if far else low
        values = self.v.between(first, end)
        i = torch.arange(start, end, device=values.device)[:, None]
        scores = _score(heads.near_q, self.near_k.between(low, end))
        if far:
            assert self.far_k is not None and self.window is not None and heads.far_q is not None
            high = end - self.window
            beyond = _score(heads.far_q, self.far_k.between(0, high))
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
    """Products of q [B, S, n, H] and k [B, heads, t, H], [B, heads, S, group, t]."""
    q = q.unflatten(2, (k.shape[1], -1)).transpose(1, 2)
    return (q.flatten(2, 3) @ k.transpose(-1, -2)).unflatten(2, q.shape[2:4])


class Cache:
    """What decoding keeps for a whole network.

    Args:
        config: the network's sizes.
        position: the map to read with.
        trained_length: tokens the network was trained at.
        batch: rows B.
        capacity: tokens a row can grow to, padding included.
        starts_B: int64 place of each row's first token (rows are padded on the left); None = all begin at 0.
    """

    def __init__(
        self,
        config: ModelConfig,
        position: PositionConfig,
        trained_length: int,
        batch: int,
        capacity: int,
        starts_B: Tensor | None = None,
    ):
        self.config, self.position, self.trained_length = config, position, trained_length
        self.batch, self.capacity, self.starts_B = batch, capacity, starts_B
        places = (Place(config, layer) for layer in range(config.num_hidden_layers))
        self.layers = [LayerCache(place, position, capacity, starts_B) for place in places]

    @property
    def length(self) -> int:
        """Tokens held a row, padding included."""
        return self.layers[0].length

    def reading(self, B: int, S: int, device: torch.device, dtype: torch.dtype) -> Reading:
        """Positions of the next S tokens of every row.

        Raises:
            ValueError: another batch size, or more tokens than there is room for.
        """
        if self.batch != B:
            raise ValueError(f"the cache was made for {self.batch} rows and got {B}; make one for {B}")
        if self.length + S > self.capacity:
            raise ValueError(
                f"{self.length} cached tokens and {S} more exceed the cache's capacity of {self.capacity}; make it larger"
            )
        padded = self.starts_B if self.length == 0 else None
        return reading(
            self.position, self.config, B, S, None if padded is None else _boundaries(padded, S),
            device, dtype, self.trained_length, offset=self.length, starts_B=self.starts_B,
        )  # fmt: skip


def _boundaries(starts_B: Tensor, S: int) -> Tensor:
    """Document boundaries that keep each row's padding apart from its tokens."""
    rows = torch.arange(len(starts_B), device=starts_B.device) * S
    ends = torch.tensor([len(starts_B) * S], device=starts_B.device)
    return torch.cat((rows, rows + starts_B, ends)).unique().to(torch.int32)
