"""Attention by brute force: every pair (i, j) rotated by relative_position(i - j) on its own."""

import torch
from torch import Tensor

from model.attention.gqa import GroupedQueryAttention
from model.attention.mla import LatentAttention
from model.config import ModelConfig
from model.parallel.layers import serial_kit
from model.positions.batch import TokenLayout, make_positions
from model.positions.config import PositionConfig
from model.positions.log_n import query_scale

TRAINED = 16

MAPS = {
    "rope": PositionConfig(),
    "none": PositionConfig(kind="none"),
    "pi": PositionConfig(kind="pi", factor=4),
    "ntk": PositionConfig(kind="ntk", factor=4),
    "ntk-mixed": PositionConfig(kind="ntk-mixed", factor=4),
    "yarn": PositionConfig(kind="yarn", factor=4),
    "yarn-factors": PositionConfig(
        kind="yarn", factor=4, beta_fast=2.0, beta_slow=0.3, attention_factor=1.4, rotated_factor=0.7, log_n="trained"
    ),
    "llama3": PositionConfig(kind="llama3", factor=4, low_freq_factor=0.5, high_freq_factor=2.0),
    "rerope": PositionConfig(kind="rerope", window=7),
    "rerope-logn": PositionConfig(kind="rerope", window=7, log_n="inference"),
    "leaky": PositionConfig(kind="leaky-rerope", window=7, leak=16, log_n="trained"),
    "inverse": PositionConfig(kind="leaky-rerope", window=5, leak=1 / 16),
}


def rotate_pairs(x: Tensor, angle: Tensor) -> Tensor:
    """Rotate the half-split pairs of x by `angle` (broadcast over all but the last dimension)."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)


def attention_oracle(
    q: Tensor, k: Tensor, v: Tensor, position: PositionConfig, scale: float, rotary: int, cu_seqlens: Tensor | None = None
) -> Tensor:
    """[B, S, n, Hv] from unrotated q, k [B, S, heads, H], of which the last `rotary` channels rotate."""
    B, S, n, H = q.shape
    k, v = (x.repeat_interleave(n // x.shape[2], 2) for x in (k, v))
    i = torch.arange(S)
    distance = (i[:, None] - i).clamp(min=0)
    angle = position.map.relative_position(distance)[..., None] * position.map.frequencies(rotary, TRAINED)
    seen = (i[:, None] >= i).expand(B, S, S)
    index = i.expand(B, S)
    if cu_seqlens is not None:
        flat = torch.arange(B * S)
        document = (torch.searchsorted(cu_seqlens.long(), flat, right=True) - 1).view(B, S)
        seen = seen & (document[:, :, None] == document[:, None, :])
        index = flat.view(B, S) - cu_seqlens.long()[document]
    query_factor = query_scale(position, index, TRAINED)
    if query_factor is not None:
        q = q * query_factor[..., None, None]
    rotated = rotate_pairs(q[:, :, None, :, H - rotary :], angle[None, :, :, None])
    scores = position.rotated_factor**2 * torch.einsum("bijnh,bjnh->bnij", rotated, k[..., H - rotary :])
    scores = scores + torch.einsum("binh,bjnh->bnij", q[..., : H - rotary], k[..., : H - rotary])
    p = (scores * scale).masked_fill(~seen[:, None], float("-inf")).softmax(-1)
    return torch.einsum("bnij,bjnh->binh", p, v)


def layer_oracle(layer, config: ModelConfig, position: PositionConfig, h_TD: Tensor, B: int, S: int, cu_seqlens=None) -> Tensor:
    """What a full attention layer returns, [T, D], by brute force."""
    positions = make_positions(PositionConfig(kind="none"), config, TokenLayout(B, S), TRAINED, "cpu", h_TD.dtype)
    match layer:
        case GroupedQueryAttention():
            q, k, v = layer.project(h_TD, positions)
        case LatentAttention():
            q, latent, shared = layer.project(h_TD, positions)
            n, nope = layer.local_heads, layer.nope_size
            up = layer.kv_b_proj(latent).view(B, S, n, -1)
            shared, rope = (torch.cat((x[..., 0::2], x[..., 1::2]), -1) for x in (shared, q[..., nope:]))
            q = torch.cat((q[..., :nope], rope), -1)
            k = torch.cat((up[..., :nope], shared.expand(B, S, n, -1)), -1)
            v = up[..., nope:]
    out = attention_oracle(q, k, v, position, layer.scale, config.rotary_size, cu_seqlens)
    return layer.o_proj(out.reshape(B * S, -1))


def make_layer(layer: int = 0, **config):
    """A configuration of 4 heads on width 16, and one layer of it in float64."""
    torch.manual_seed(0)
    settings = ModelConfig(**({"hidden_size": 16, "num_attention_heads": 4, "head_dim": 8} | config))
    module = settings.kinds[0](settings, layer, serial_kit(torch.float64))
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return settings, module


def positions_of(config, position=None, batch=2, sequence=20, cu_seqlens=None):
    tokens = TokenLayout(batch, sequence, cu_seqlens)
    return make_positions(position or PositionConfig(), config, tokens, TRAINED, "cpu", torch.float64)
