"""Attention diagnostics: entropy, concentration and the largest logit of every layer, sampled from a few queries."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.attention.kernels.inputs import AttentionInputs
from model.decoder import Decoder
from model.parallel.mesh import Mesh
from model.positions.batch import TokenLayout

QUERIES = 64


@dataclass(frozen=True)
class AttentionStatistics:
    """Statistics of one layer's attention, entropy and concentration averaged over heads and queries."""

    entropy: float
    """Of a row of probabilities, in nats; log n when all n visible tokens have the same probability."""
    concentration: float
    """S(a) = mean a / sqrt(mean a^2) over visible tokens: 1 = uniform, small = on few (Su 2023, kexue.fm/archives/9889)."""
    largest_logit: float
    """Largest scaled score of any pair."""


@torch.no_grad()
def attention_statistics(decoder: Decoder, inputs_BS: Tensor, mesh: Mesh, queries: int = QUERIES) -> list[AttentionStatistics]:
    """Statistics of every layer on the first sequence of a batch; costs one forward of that sequence.

    Args:
        decoder: the network; every rank of its tensor-parallel group calls.
        inputs_BS: token ids.
        mesh: this rank's coordinates; the heads of all tensor-parallel ranks count.
        queries: number of sampled queries, evenly spaced over the sequence.
    """
    # this shape would make compiled blocks compile again, and sequence parallelism may not divide it
    with torch.compiler.set_stance("force_eager"), decoder.kit.tokens_whole():
        positions = decoder.positions_for(TokenLayout(1, inputs_BS.shape[1]))
        x_TD = decoder.model.embed(inputs_BS[0])
        statistics = []
        block: Any
        for block in decoder.model.layers:
            layer = block.self_attn
            inputs = layer.attention_inputs(*layer.project(block.attention_input(x_TD), positions), positions)
            statistics.append(layer_statistics(inputs, layer.scale, layer.layer_positions.kernel_window(positions), queries))
            x_TD = block(x_TD, positions)
    all_layers = torch.stack(statistics)
    largest = mesh.tensor.max(all_layers[:, 2].clone())
    all_layers = torch.cat((mesh.tensor.sum(all_layers)[:, :2] / mesh.tensor.size, largest[:, None]), dim=1)
    return [AttentionStatistics(*values) for values in all_layers.tolist()]


def layer_statistics(inputs: AttentionInputs, scale: float, window: int | None, queries: int = QUERIES) -> Tensor:
    """Entropy, concentration and largest logit, float32 [3], of one sequence; arguments as
    model.attention.kernels.reference.reference_attention."""
    S, n = inputs.near_q.shape[1:3]
    i = torch.linspace(0, S - 1, min(queries, S), device=inputs.v.device).round().long()
    distance = i[:, None] - torch.arange(S, device=i.device)
    scores, seen = _scores(inputs.near_q[0, i], inputs.near_k[0], n), distance >= 0
    if inputs.far_q is not None and inputs.far_k is not None:
        assert window is not None
        scores = torch.where(distance < window, scores, _scores(inputs.far_q[0, i], inputs.far_k[0], n))
    elif window is not None:
        seen = seen & (distance < window)
    scores = (scores * scale).masked_fill(~seen, float("-inf"))
    p = scores.softmax(dim=-1)
    entropy = -torch.special.xlogy(p, p).sum(dim=-1)
    concentration = (p.square().sum(dim=-1) * seen.sum(dim=-1)).rsqrt()
    return torch.stack((entropy.mean(), concentration.mean(), scores.max()))


def _scores(q: Tensor, k: Tensor, n: int) -> Tensor:
    """[n, queries, S] in float32 from q [queries, n, H] and k [S, kv heads, H]."""
    k = k.repeat_interleave(n // k.shape[1], dim=1)
    return torch.einsum("inh,jnh->nij", q.float(), k.float())
