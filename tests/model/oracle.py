"""Attention by brute force: every pair (i, j) rotated by relative(i - j) on its own."""

import torch
from torch import Tensor

from model.attention import Attention
from model.config import ModelConfig, PositionConfig
from model.latent import LatentAttention
from model.positions import frequencies, query_factor, reading, relative

TRAINED = 16

MAPS = {
    "rope": PositionConfig(),
    "none": PositionConfig(kind="none"),
    "pi": PositionConfig(kind="pi", factor=4),
    "ntk": PositionConfig(kind="ntk", factor=4),
    "ntk-mixed": PositionConfig(kind="ntk-mixed", factor=4),
    "yarn": PositionConfig(kind="yarn", factor=4),
    "rerope": PositionConfig(kind="rerope", window=7),
    "rerope-logn": PositionConfig(kind="rerope", window=7, log_n="inference"),
    "leaky": PositionConfig(kind="leaky-rerope", window=7, leak=16, log_n="trained"),
    "inverse": PositionConfig(kind="leaky-rerope", window=5, leak=1 / 16),
}


def turn_pairs(x: Tensor, angle: Tensor) -> Tensor:
    """Rotate the half-split pairs of x by `angle` (broadcast over all but the last dimension)."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)


def attention_oracle(
    q: Tensor, k: Tensor, v: Tensor, position: PositionConfig, scale: float, rotary: int, cu_seqlens: Tensor | None = None
) -> Tensor:
    """[B, S, n, Hv] from unrotated q, k [B, S, heads, H], of which the last `rotary` channels turn."""
    B, S, n, H = q.shape
    k, v = (x.repeat_interleave(n // x.shape[2], 2) for x in (k, v))
    i = torch.arange(S)
    distance = (i[:, None] - i).clamp(min=0)
    angle = relative(position, distance)[..., None] * frequencies(position, rotary, TRAINED)
    seen = (i[:, None] >= i).expand(B, S, S)
    place = i.expand(B, S)
    if cu_seqlens is not None:
        flat = torch.arange(B * S)
        document = (torch.searchsorted(cu_seqlens.long(), flat, right=True) - 1).view(B, S)
        seen = seen & (document[:, :, None] == document[:, None, :])
        place = flat.view(B, S) - cu_seqlens.long()[document]
    factor = query_factor(position, place, TRAINED)
    if factor is not None:
        q = q * factor[..., None, None]
    turned = turn_pairs(q[:, :, None, :, H - rotary :], angle[None, :, :, None])
    scores = torch.einsum("bijnh,bjnh->bnij", turned, k[..., H - rotary :])
    scores = scores + torch.einsum("binh,bjnh->bnij", q[..., : H - rotary], k[..., : H - rotary])
    p = (scores * scale).masked_fill(~seen[:, None], float("-inf")).softmax(-1)
    return torch.einsum("bnij,bjnh->binh", p, v)


def layer_oracle(layer, config: ModelConfig, position: PositionConfig, h_TD: Tensor, B: int, S: int, cu_seqlens=None) -> Tensor:
    """What a full attention layer returns, [T, D], by brute force."""
    read = reading(PositionConfig(kind="none"), config, B, S, None, "cpu", h_TD.dtype, TRAINED)
    match layer:
        case Attention():
            q, k, v = layer.project(h_TD, read)
        case LatentAttention():
            q, latent, shared = layer.project(h_TD, read)
            up = layer.kv_b_proj(latent).view(B, S, layer.heads, -1)
            nope = layer.nope
            shared, turned = (torch.cat((x[..., 0::2], x[..., 1::2]), -1) for x in (shared, q[..., nope:]))
            q = torch.cat((q[..., :nope], turned), -1)
            k = torch.cat((up[..., :nope], shared.expand(B, S, layer.heads, -1)), -1)
            v = up[..., nope:]
    out = attention_oracle(q, k, v, position, layer.scale, config.rotary_size, cu_seqlens)
    return layer.o_proj(out.reshape(B * S, -1))
