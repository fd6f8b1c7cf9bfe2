"""Position maps: from the distance r = i - j of a query i and a key j to the rotation between them.

`relative` is the single source of truth. Training, prefill, decoding and tests read the tables built here from it.
A map with a window (ReRoPE, Leaky and inverse Leaky ReRoPE; kexue 9708, 9728) is linear on each side of it:

    near, r < w     R(i) q_i                  R(j) k_j
    far, r >= w     R(w + (i - w) / k) q_i    R(j / k) k_j        k = infinity for ReRoPE, whose far keys stay unrotated

Angles are built in float64 and kept as cosines and sines: a float32 angle is off by 1e-3 at positions that inverse
Leaky ReRoPE reaches, a bf16 one has 897 different values below 8192.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from model.config import ModelConfig, PositionConfig

YARN_MOST_TURNS = 32.0
"""Frequencies that turn more often than this within the trained length are left alone (DeepSeek's beta)."""


def relative(position: PositionConfig, distance: Tensor) -> Tensor:
    """Rotation, in positions, between a query and a key `distance` >= 0 tokens before it; float64, any shape."""
    r = distance.double()
    match position.kind:
        case "rope" | "ntk" | "ntk-mixed" | "yarn":
            return r
        case "none":
            return torch.zeros_like(r)
        case "pi":
            return r / position.factor
        case "rerope" | "leaky-rerope":
            return torch.where(r < window(position), r, window(position) + step(position) * (r - window(position)))
        case _:
            raise ValueError(f"position.kind = '{position.kind}' is unknown")


def window(position: PositionConfig) -> int:
    """Distances below it are exact."""
    assert position.window is not None
    return position.window


def step(position: PositionConfig) -> float:
    """What one more token beyond the window adds: 0 for ReRoPE, 1/k for Leaky (above 1 for the inverse)."""
    return 0.0 if position.kind == "rerope" else 1.0 / (position.leak or 1.0)


def has_window(position: PositionConfig) -> bool:
    """Whether the map has two regions."""
    return position.kind in ("rerope", "leaky-rerope")


def frequencies(position: PositionConfig, size: int, trained_length: int) -> Tensor:
    """Radians a position for each pair of the `size` rotated channels, float64 [size / 2].

    ntk is bloc97's rule, base * s^(d/(d-2)), which interpolates the lowest frequency exactly. ntk-mixed is
    theta_i * exp(-a (i+1)^c) with a (d/2)^c = log s (kexue 9706); c = 1 is the post's NTK-fixed, c = 0 is PI.
    """
    index = torch.arange(size // 2, dtype=torch.float64)
    plain = position.rope_theta ** (-2 * index / size)
    match position.kind:
        case "rope" | "none" | "pi" | "rerope" | "leaky-rerope":
            return plain
        case "ntk":
            base = position.rope_theta * position.factor ** (size / max(size - 2, 1))
            return base ** (-2 * index / size)
        case "ntk-mixed":
            c = position.mixed_exponent
            return plain * torch.exp(-math.log(position.factor) * ((index + 1) / (size / 2)) ** c)
        case "yarn":
            kept = _yarn_kept(position, plain, size, trained_length)
            return (kept + (1 - kept) / position.factor) * plain
        case _:
            raise ValueError(f"position.kind = '{position.kind}' is unknown")


def _yarn_kept(position: PositionConfig, plain: Tensor, size: int, trained_length: int) -> Tensor:
    """Share of each frequency that is not interpolated: 1 for fast ones, 0 for those that never turn once."""
    if position.yarn_ramp == "turns":
        turns = plain * trained_length / (2 * math.pi)
        return ((turns - 1) / (YARN_MOST_TURNS - 1)).clamp(0, 1)

    def index_of(turns: float) -> float:
        return size * math.log(trained_length / (turns * 2 * math.pi)) / (2 * math.log(position.rope_theta))

    low = max(math.floor(index_of(YARN_MOST_TURNS)), 0)
    high = min(math.ceil(index_of(1.0)), size - 1)
    ramp = (torch.arange(size // 2, dtype=torch.float64) - low) / max(high - low, 0.001)
    return 1 - ramp.clamp(0, 1)


def query_factor(position: PositionConfig, place: Tensor, trained_length: int) -> Tensor | None:
    """What multiplies the query at `place` (0-based, float64 result of the same shape), or None for 1 everywhere.

    log n (kexue 8823): n = place + 1 keys are visible; log n / log L, unclipped when trained with it, at least 1 when
    only read with it. YaRN's logits are multiplied by (1 + 0.1 log s)^2.
    """
    n = place.double() + 1
    match position.log_n:
        case "none":
            factor = None
        case "trained":
            factor = n.log() / math.log(trained_length)
        case "inference":
            factor = (n.log() / math.log(trained_length)).clamp(min=1.0)
        case _:
            raise ValueError(f"position.log_n = '{position.log_n}' is unknown")
    if position.kind == "yarn" and position.factor > 1:
        yarn = (1 + 0.1 * math.log(position.factor)) ** 2
        factor = torch.full_like(n, yarn) if factor is None else factor * yarn
    return factor


def readable_length(read: PositionConfig, trained: PositionConfig, trained_length: int) -> int | None:
    """Tokens over which every rotation of `read` was met when training with `trained`; None = no limit (kexue 9728)."""
    largest = float(relative(trained, torch.tensor(trained_length - 1)))
    match read.kind:
        case "none":
            return None
        case "rope":
            return math.floor(largest) + 1
        case "pi" | "ntk" | "ntk-mixed" | "yarn":
            return math.floor(largest * read.factor) + 1
        case "rerope" | "leaky-rerope":
            if window(read) > largest:
                return math.floor(largest) + 1
            beyond = largest - window(read)
            return None if step(read) == 0 else window(read) + math.floor(beyond / step(read)) + 1
        case _:
            raise ValueError(f"position.kind = '{read.kind}' is unknown")


@dataclass(frozen=True)
class Turn:
    """Rotation at each of S places: cosines and sines [S, size / 2], float32 (float64 for a float64 network)."""

    cos: Tensor
    sin: Tensor

    def narrow(self, start: int, length: int) -> "Turn":
        """The rows from `start` on."""
        return Turn(self.cos.narrow(0, start, length), self.sin.narrow(0, start, length))


def rotate(x: Tensor, turn: Turn | None, factor: Tensor | None = None, interleaved: bool = False) -> Tensor:
    """Rotate the channels of x [B, S, heads, size] in pairs, and scale; in float32 or better, back in the dtype of x.

    Pairs are (c, c + size/2) as in Llama, or with `interleaved` (2c, 2c + 1) as in DeepSeek-V3; the result always has
    the first members first, which changes no score. `factor` is broadcast against [B, S].
    """
    if turn is None and factor is None:
        return x
    wide = x
    if turn is not None:
        a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
        cos, sin = turn.cos[:, None, :], turn.sin[:, None, :]
        wide = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    if factor is not None:
        wide = wide * factor[..., None, None]
    return wide.to(x.dtype)


@lru_cache(maxsize=32)
def _turn(position: PositionConfig, size: int, trained_length: int, length: int, which: str, device: str, double: bool) -> Turn:
    place = torch.arange(length, dtype=torch.float64)
    match which:
        case "near":
            place = place / position.factor if position.kind == "pi" else place
        case "far-query":
            place = window(position) + step(position) * (place - window(position))
        case "far-key":
            place = step(position) * place
        case _:
            raise AssertionError(which)
    with torch.inference_mode(False):  # a table made while decoding serves training later
        angle = torch.outer(place, frequencies(position, size, trained_length))
        dtype = torch.float64 if double else torch.float32
        return Turn(angle.cos().to(device, dtype), angle.sin().to(device, dtype))


@dataclass(frozen=True)
class Documents:
    """Where packed documents begin and end in the T = B * S flattened tokens."""

    boundaries: Tensor
    """int32 [documents + 1] on the device: 0, ..., T."""
    far_queries: Tensor | None = None
    """int64: tokens with at least `window` tokens of their own document before them."""
    far_keys: Tensor | None = None
    """int64: the tokens they see beyond the window; as many, document by document."""
    far_boundaries: Tensor | None = None
    """int32: boundaries of those two lists by document."""

    def vary(self) -> "Documents":
        """These, told to torch.compile as lists whose lengths vary: else the first batch compiles code for its own lengths, and
        a run that resumes compiles it for another batch's, with other bits."""
        for x in (self.boundaries, self.far_queries, self.far_keys, self.far_boundaries):
            if x is not None:
                torch._dynamo.maybe_mark_dynamic(x, 0)
        return self

    def to(self, device: torch.device) -> "Documents":
        """These, on the device; the host does not wait for it."""

        def moved(x: Tensor | None) -> Tensor | None:
            pinned = x.pin_memory() if x is not None and device.type == "cuda" and not x.is_cuda else x
            return None if pinned is None else pinned.to(device, non_blocking=True)

        lists = (moved(x) for x in (self.far_queries, self.far_keys, self.far_boundaries))
        return Documents(moved(self.boundaries), *lists)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Reading:
    """How one forward pass reads its tokens: made once, used by every layer."""

    batch: int
    sequence: int
    near: Turn | None
    """Rotation of queries and keys (nearer than the window); None = no rotation."""
    far_query: Turn | None = None
    far_key: Turn | None = None
    """None with a window = far keys stay unrotated (ReRoPE)."""
    window: int | None = None
    """Distance from which the far rotation holds; None = one region."""
    factor: Tensor | None = None
    """Scale of the queries of full layers, [1 or B, S]: log n and YaRN's."""
    windowed_factor: Tensor | None = None
    """The same for windowed layers: YaRN's alone, since what they see does not grow."""
    documents: Documents | None = None
    offset: int = 0
    """Place of the first token: tokens already in the cache."""

    @property
    def split(self) -> bool:
        """Whether any pair is far: a sequence within the window is read exactly as with RoPE."""
        return self.window is not None and self.offset + self.sequence > self.window


def reading(
    position: PositionConfig,
    model: ModelConfig,
    batch: int,
    sequence: int,
    cu_seqlens: Tensor | None,
    device: torch.device | str,
    dtype: torch.dtype,
    trained_length: int,
    offset: int = 0,
    starts_B: Tensor | None = None,
) -> Reading:
    """How a batch of B sequences of S tokens is read.

    Args:
        position: the map.
        model: gives the number of rotated channels.
        cu_seqlens: int32 document boundaries over the flattened tokens, row starts included; None = whole rows. On the
            CPU: lists of unknown length are made of them, for which a GPU would be waited for.
        dtype: of the network; a float64 one gets float64 tables.
        trained_length: tokens, for log n and YaRN, unless the position says otherwise.
        offset: tokens before the first one (decoding).
        starts_B: place of each row's first real token (decoding prompts of unequal length).
    """
    trained_length = position.trained_length or trained_length
    device = torch.device(device)
    length = 1 << max(offset + sequence - 1, 1).bit_length()

    def turn(which: str) -> Turn:
        settings: Any = position  # frozen, so it can be hashed
        table = _turn(settings, model.rotary_size, trained_length, length, which, str(device), dtype == torch.float64)
        return table.narrow(offset, sequence)

    windowed = has_window(position)
    documents = None  # the CPU walks over documents and needs no lists
    if cu_seqlens is not None:
        documents = pack(cu_seqlens, position.window, lists=device.type != "cpu").to(device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    factor = windowed_factor = None
    if position.log_n != "none" or position.kind == "yarn":
        place = _places(batch, sequence, offset, documents, starts_B, device)
        factor = query_factor(position, place, trained_length)
        factor = None if factor is None else factor.to(wide)
        windowed_factor = query_factor(position.model_copy(update={"log_n": "none"}), place, trained_length)
        windowed_factor = None if windowed_factor is None else windowed_factor.to(wide)
    return Reading(
        batch=batch,
        sequence=sequence,
        near=None if position.kind == "none" else turn("near"),
        far_query=turn("far-query") if windowed else None,
        far_key=turn("far-key") if windowed and step(position) > 0 else None,
        window=position.window if windowed else None,
        factor=factor,
        windowed_factor=windowed_factor,
        documents=documents,
        offset=offset,
    )


def _places(
    batch: int, sequence: int, offset: int, documents: Documents | None, starts_B: Tensor | None, device: torch.device
) -> Tensor:
    """Place of each token in its own document, [1 or B, S]."""
    place = torch.arange(offset, offset + sequence, device=device)[None]
    if documents is not None:
        flat = torch.arange(batch * sequence, device=device)
        document = torch.searchsorted(documents.boundaries.long(), flat, right=True) - 1
        return (flat - documents.boundaries.long()[document]).view(batch, sequence)
    return place if starts_B is None else (place - starts_B[:, None]).clamp(min=0)


def pack(boundaries: Tensor, window: int | None, lists: bool) -> Documents:
    """Documents from their boundaries; `lists` makes those of a window, which kernels for packed tokens gather by."""
    boundaries = boundaries.to(torch.int32)
    if window is None or not lists:
        return Documents(boundaries)
    starts, ends = boundaries[:-1].long(), boundaries[1:].long()
    flat = torch.arange(int(boundaries[-1]), device=boundaries.device)
    document = torch.searchsorted(boundaries.long(), flat, right=True) - 1
    counts = (ends - starts - window).clamp(min=0)
    return Documents(
        boundaries,
        far_queries=flat[flat - starts[document] >= window],
        far_keys=flat[flat + window < ends[document]],
        far_boundaries=torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32),
    )
