"""The decoder by its formulas: whole matrices of scores with an explicit mask, gradients by autograd, one process.

Tensors are weights by name (tests/combinations/weights.py). Matrix products run in the dtype of the weights; norms,
rotations, softmax and loss in that dtype or float32, whichever is wider.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.combinations.experts import Routed, mixture, wide
from tests.combinations.positions import Piece, frequencies, log_n, pieces, turned_factor, yarn_factor
from tests.combinations.weights import ROUTER_BIAS, Weights, has_experts, head_size

Batch = tuple[Tensor, Tensor, Tensor | None]
"""Inputs [B, S], targets [B, S] (-100 = not scored), and int boundaries of documents over the B * S tokens or None."""


def cast(weights: Weights, dtype: torch.dtype) -> Weights:
    """The weights as a network of a dtype has them: biases of routers stay wide."""
    return {name: wide(weight) if name.endswith(ROUTER_BIAS) else weight.to(dtype) for name, weight in weights.items()}


@dataclass(frozen=True)
class Shown:
    """What a pass has shown beside its losses."""

    largest_LN: Tensor
    """For each head of each layer the largest log-sum-exp of a query's scores."""
    routed: list[Routed]
    """Of the layers with experts."""

    @property
    def routers_loss(self) -> Tensor | float:
        """What routers add to the loss, summed over tokens."""
        return sum(each.loss for each in self.routed)


@dataclass(frozen=True)
class Scene:
    """What attention must know of the tokens and of the map they are evaluated with."""

    position: Any
    trained_length: int
    document_BS: Tensor
    place_BS: Tensor
    """Tokens of the same document before each."""
    largest: list[Tensor] = field(default_factory=list)
    """Filled layer by layer: for each head the largest log-sum-exp of a query's scores, [N]."""
    routed: list[Routed] = field(default_factory=list)
    """Filled layer by layer, of layers with experts."""


def scene(config: Any, inputs_BS: Tensor, cu_seqlens: Tensor | None, position: Any | None) -> Scene:
    """The scene of a batch; without boundaries each row is a document."""
    B, S = inputs_BS.shape
    flat = torch.arange(B * S)
    starts = flat[::S] if cu_seqlens is None else cu_seqlens[:-1].long()
    begins = torch.zeros(B * S, dtype=torch.long)
    begins[starts] = 1
    document = begins.cumsum(0) - 1
    trained = config.position.trained_length or config.train.sequence_length
    read = position or config.position
    return Scene(read, read.trained_length or trained, document.view(B, S), (flat - starts[document]).view(B, S))


@dataclass(frozen=True)
class Layer:
    """How one layer attends."""

    pieces: list[Piece]
    seen: int | None
    """Tokens per query sees, itself included; None = all before it."""
    factor_BS: Tensor
    """Multiplies the queries, float64."""
    turned_factor: float = 1.0
    """Multiplies what is turned of the queries, in addition."""
    base: float | None = None
    """Of plain RoPE in place of the map's frequencies."""


def layer_rules(config: Any, layer: int, look: Scene) -> Layer:
    """The map, the window and the query factors of a layer.

    Windowed layers have neither a far region nor log n, and of a map with a base of theirs nothing else either; a layer
    without positions has no factor of the map, a full one beside windowed ones that is not turned has yarn's.
    """
    model, position = config.model, look.position
    window, still = model.sliding_window, [Piece(0, 0.0)]
    full = window is None or _listed(model, model.full_attention_layers, layer)
    seen, ones = None if full else window, torch.ones(look.place_BS.shape, dtype=torch.float64)
    counted = log_n(position, look.place_BS, look.trained_length) if full else ones
    if _listed(model, model.layers_without_positions, layer):
        return Layer(still, seen, counted)
    if not full and position.windowed_rope_theta is not None:
        return Layer([Piece(0, 1.0)], seen, ones, base=position.windowed_rope_theta)
    factor = counted * yarn_factor(position)
    if full and window is not None and model.full_attention_position == "none":
        return Layer(still, seen, factor)
    return Layer(pieces(position) if full else pieces(position)[:1], seen, factor, turned_factor(position))


def _listed(model: Any, layers: Sequence[int], layer: int) -> bool:
    return layer in [index % model.num_hidden_layers for index in layers]


def rotate(x: Tensor, angle_SC: Tensor, interleaved: bool) -> Tensor:
    """x [B, heads, S, 2C] with its pairs turned, (c, c + C) or (2c, 2c + 1); first members first in the result."""
    x = wide(x)
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :])
    cos, sin = angle_SC.cos().to(x.dtype), angle_SC.sin().to(x.dtype)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, turned: int, scale: float, look: Scene, how: Layer, interleaved: bool) -> Tensor:
    """Attention with whole matrices of scores.

    Args:
        q, k, v: [B, N or K, S, size] before rotation; query head n belongs to key head n // (N / K).
        turned: the last channels of q and k, which are rotated.
        scale: multiplies the scores.

    Returns:
        [B, N, S, size of v].
    """
    S, share = q.shape[2], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(share, dim=1), v.repeat_interleave(share, dim=1)
    place = torch.arange(S, dtype=torch.float64)
    r = torch.arange(S)[:, None] - torch.arange(S)
    theta = frequencies(look.position, turned, look.trained_length)
    if how.base is not None:
        theta = torch.tensor([how.base ** (-i / turned) for i in range(0, turned, 2)], dtype=torch.float64)
    still, moving = q.shape[-1] - turned, slice(q.shape[-1] - turned, None)
    factor = how.factor_BS[:, None, :, None].to(wide(q).dtype)
    scores = torch.zeros((), dtype=q.dtype)
    for piece in how.pieces:
        q_angle, k_angle = (torch.outer(piece.slope * place + offset, theta) for offset in (piece.offset, 0.0))
        moved = rotate(q[..., moving], q_angle, interleaved) * how.turned_factor
        turned_q = torch.cat((wide(q[..., :still]), moved), dim=-1) * factor
        turned_k = torch.cat((wide(k[..., :still]), rotate(k[..., moving], k_angle, interleaved)), dim=-1)
        here = turned_q.to(q.dtype) @ turned_k.to(k.dtype).transpose(-1, -2)
        scores = torch.where(r >= piece.first, here, scores)
    hidden = (r < 0) | (look.document_BS[:, None, :, None] != look.document_BS[:, None, None, :])
    if how.seen is not None:
        hidden = hidden | (r >= how.seen)
    seen = (wide(scores) * scale).masked_fill(hidden, float("-inf"))
    look.largest.append(seen.detach().exp().sum(dim=-1).log().amax(dim=(0, 2)))
    return seen.softmax(dim=-1).to(v.dtype) @ v


def rms_norm(model: Any, x: Tensor, gain: Tensor, eps: float | None = None) -> Tensor:
    """x over the root of its mean square, times the gain, which may be given as what is added to 1."""
    normed = wide(x) / (wide(x).square().mean(dim=-1, keepdim=True) + (eps or model.rms_norm_eps)).sqrt()
    if model.zero_centered_gains:
        return (normed + normed * wide(gain)).to(x.dtype)
    return normed.to(x.dtype) * gain


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    """x by the rows of a matrix, plus its bias if it has one."""
    product = x @ w[name].T
    return product + w[f"{name}.bias"] if f"{name}.bias" in w else product


NORMS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "pre": (("input_layernorm", "post_attention_layernorm"), ()),
    "post": ((), ("post_attention_layernorm", "post_feedforward_layernorm")),
    "sandwich": (
        ("input_layernorm", "pre_feedforward_layernorm"), ("post_attention_layernorm", "post_feedforward_layernorm"),
    ),
}  # fmt: skip
"""Names of the norms before and after attention and mlp."""


def _heads(x_BSE: Tensor, size: int) -> Tensor:
    return x_BSE.unflatten(-1, (-1, size)).transpose(1, 2)


def grouped_query(config: Any, w: Weights, h_BSD: Tensor, look: Scene, how: Layer) -> Tensor:
    """What the heads of a grouped-query layer give, [B, N, S, H]."""
    model, H = config.model, head_size(config.model)
    q, k, v = (linear(w, f"{name}_proj", h_BSD) for name in "qkv")
    if model.qk_norm == "rms-all-heads":
        q, k = rms_norm(model, q, w["q_norm"]), rms_norm(model, k, w["k_norm"])
    q, k, v = (_heads(x, H) for x in (q, k, v))
    if model.qk_norm == "rms":
        q, k = rms_norm(model, q, w["q_norm"]), rms_norm(model, k, w["k_norm"])
    elif model.qk_norm == "key-l2":
        k = k / k.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    scale = 1.0 if model.qk_norm == "key-l2" else 1 / math.sqrt(model.query_pre_attn_scalar or H)
    return attend(q, k, v, H, scale, look, how, interleaved=False)


def latent(config: Any, w: Weights, h_BSD: Tensor, look: Scene, how: Layer) -> Tensor:
    """What the heads of a multi-head latent layer give, [B, N, S, v_head_dim]."""
    model = config.model
    nope, rope, N = model.qk_nope_head_dim, model.qk_rope_head_dim, model.num_attention_heads
    if model.q_lora_rank is None:
        q = h_BSD @ w["q_proj"].T
    else:
        q = rms_norm(model, h_BSD @ w["q_a_proj"].T, w["q_a_layernorm"], model.latent_norm_eps) @ w["q_b_proj"].T
    down = h_BSD @ w["kv_a_proj_with_mqa"].T
    c, shared = down[..., : model.kv_lora_rank], down[..., model.kv_lora_rank :]
    up = _heads(rms_norm(model, c, w["kv_a_layernorm"], model.latent_norm_eps) @ w["kv_b_proj"].T, nope + model.v_head_dim)
    k = torch.cat((up[..., :nope], shared[:, None].expand(-1, N, -1, -1)), dim=-1)
    return attend(
        _heads(q, nope + rope), k, up[..., nope:], rope, (nope + rope) ** -0.5, look, how, interleaved=True
    )  # fmt: skip


def logits(
    config: Any,
    weights: Weights,
    inputs_BS: Tensor,
    cu_seqlens: Tensor | None = None,
    position: Any | None = None,
    shown: list[Shown] | None = None,
) -> Tensor:
    """[B, S, V] in the dtype of the weights; `position` is another map to evaluate with, `shown` is given what the pass has
    shown."""
    model, look = config.model, scene(config, inputs_BS, cu_seqlens, position)
    x = weights["model.embed_tokens.weight"][inputs_BS]
    if model.scale_embedding:
        x = x * torch.tensor(math.sqrt(model.hidden_size), dtype=x.dtype)
    layer_of = {"gqa": grouped_query, "mla": latent}[model.attention]
    for layer in range(model.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        w = {n.removeprefix(prefix).removesuffix(".weight"): t for n, t in weights.items() if n.startswith(prefix)}
        own = {n.removeprefix("self_attn."): t for n, t in w.items() if n.startswith("self_attn.")}
        before, after = NORMS[model.norm_placement]
        h = rms_norm(model, x, w[before[0]]) if before else x
        heads = layer_of(config, own, h, look, layer_rules(config, layer, look))
        y = linear(own, "o_proj", heads.transpose(1, 2).flatten(2))
        x = x + (rms_norm(model, y, w[after[0]]) if after else y)
        h = rms_norm(model, x, w[before[1]]) if before else x
        dense = partial(_mlp, model, w)
        y = mixture(model, w, h, dense, look.routed) if has_experts(model, layer) else dense("mlp", h)
        x = x + (rms_norm(model, y, w[after[1]]) if after else y)
    if shown is not None:
        shown.append(Shown(torch.stack(look.largest), look.routed))
    return _head(model, weights, rms_norm(model, x, weights["model.norm.weight"]))


def _mlp(model: Any, w: Weights, name: str, h_BSD: Tensor) -> Tensor:
    gate, up = linear(w, f"{name}.gate_proj", h_BSD), linear(w, f"{name}.up_proj", h_BSD)
    if model.feed_forward != "geglu":
        active = gate * torch.sigmoid(gate)
    else:  # GELU with tanh for the error function
        z = wide(gate)
        active = (z / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))).to(gate.dtype)
    return linear(w, f"{name}.down_proj", active * up)


def _head(model: Any, weights: Weights, h_BSD: Tensor) -> Tensor:
    if not model.tie_word_embeddings:
        return h_BSD @ weights["lm_head.weight"].T
    if model.tied_head == "half-swap":
        half = model.hidden_size // 2
        h_BSD = torch.cat((h_BSD[..., half:], h_BSD[..., :half]), dim=-1)
    elif model.tied_head == "projection":
        h_BSD = h_BSD @ weights["lm_head.projection.weight"].T
    return h_BSD @ weights["model.embed_tokens.weight"].T


def token_losses(
    config: Any, weights: Weights, batch: Batch, position: Any | None = None, shown: list[Shown] | None = None
) -> Tensor:
    """-log p(target) in nats of every token of a batch, [B, S]; 0 where the target is not scored."""
    inputs_BS, targets_BS, cu_seqlens = batch
    z = wide(logits(config, weights, inputs_BS, cu_seqlens, position, shown))
    return F.cross_entropy(z.flatten(0, 1), targets_BS.flatten(), reduction="none").view(targets_BS.shape)


def micro_gradients(
    config: Any, weights: Weights, batches: Sequence[Batch], dtype: torch.dtype, shown: list[Shown] | None = None
) -> Iterator[tuple[float, Weights]]:
    """For each micro-batch of one update, its part of the mean loss and that part's gradients (float32 or wider).

    The mean is over all targets of all micro-batches together, so that the parts add up to it. The gradients are those of the
    loss and of what routers add to it, which the loss that is given leaves out; `shown` is given one entry per micro-batch.
    """
    shown = [] if shown is None else shown
    count = sum(int((targets_BS >= 0).sum()) for _, targets_BS, _ in batches)
    used = cast({name: weight.detach() for name, weight in weights.items()}, dtype)
    leaves = {name: weight.requires_grad_() for name, weight in used.items() if not name.endswith(ROUTER_BIAS)}
    for batch in batches:
        loss = token_losses(config, used, batch, shown=shown).sum() / count
        found = torch.autograd.grad(loss + shown[-1].routers_loss / count, list(leaves.values()))
        yield loss.item(), {name: wide(gradient) for name, gradient in zip(leaves, found, strict=True)}


def gradients(
    config: Any,
    weights: Weights,
    batches: Sequence[Batch],
    dtype: torch.dtype = torch.float64,
    shown: list[Shown] | None = None,
) -> tuple[float, Weights]:
    """Mean loss in nats per target of one update, and its gradient by name (float32 or wider).

    Args:
        config: a RunConfig.
        weights: full tensors by name; used in `dtype`.
        batches: the micro-batches of the update over all ranks.
        dtype: float64 for the truth; bfloat16 for plain torch in that precision, micro-batches summed in float32.
        shown: is given what the pass of each micro-batch shows.
    """
    total, summed = 0.0, {}
    for loss, found in micro_gradients(config, weights, batches, dtype, shown):
        total += loss
        summed = {name: summed[name] + gradient if summed else gradient for name, gradient in found.items()}
    return total, summed


@torch.no_grad()
def evaluate(
    config: Any,
    weights: Weights,
    rows: Tensor,
    position: Any | None = None,
    cu_seqlens: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Loss of every target, [rows, S], in nats.

    Args:
        rows: token ids [rows, S + 1]: the first S are inputs, the last S targets.
        position: map to evaluate with; default the training map.
        cu_seqlens: boundaries of documents over the rows * S inputs.
        dtype: of the network.
    """
    return token_losses(config, cast(weights, dtype), (rows[:, :-1], rows[:, 1:], cu_seqlens), position)
