"""Attention diagnostics: entropy, concentration and the largest logit of every layer, sampled from a few queries."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.attention.base import AttentionPart
from model.decoder import Decoder
from model.parallel.mesh import Mesh
from model.positions.batch import Positions

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
        decoder: the network; all ranks call.
        inputs_BS: token ids.
        mesh: this rank's coordinates; the heads, tokens and layers of all ranks count.
        queries: number of sampled queries, evenly spaced over the sequence.
    """
    # this shape would make compiled blocks compile again, and sequence parallelism may not divide it
    with torch.compiler.set_stance("force_eager"), decoder.kit.tokens_whole():
        S, count = inputs_BS.shape[1], decoder.config.num_hidden_layers
        sampled = torch.linspace(0, S - 1, min(queries, S), device=decoder.device).round().long()
        sums = torch.zeros(count, 3, device=decoder.device)
        largest = torch.full((count,), -torch.inf, device=decoder.device)

        def measured(block: Any, x_TD: Tensor, positions: Positions, cache: None) -> Tensor:
            attention = block.self_attn
            parts = attention.parts(*attention.project(block.attention_input(x_TD), positions), positions=positions)
            of_parts = torch.stack([part_statistics(part, attention.scale, sampled) for part in parts])
            sums[block.layer], largest[block.layer] = of_parts[:, :3].sum(dim=0), of_parts[:, 3].amax()
            return block(x_TD, positions)

        decoder.run_stages(inputs_BS[:1], decoder.positions_for(decoder.token_layout(1, S)), measured)
    for axis in (mesh.tensor, mesh.context, mesh.pipeline):
        axis.sum(sums)
        axis.max(largest)
    means = sums[:, :2] / sums[:, 2:]
    return [AttentionStatistics(*values) for values in torch.cat((means, largest[:, None]), dim=1).tolist()]


def part_statistics(part: AttentionPart, scale: float, sampled: Tensor) -> Tensor:
    """Sums of entropies and of concentrations, their number, and the largest logit, float32 [4], over the heads of a part and
    those `sampled` tokens of the first sequence whose queries it has."""
    inputs, window = part.inputs, part.window
    (queries, n), keys = inputs.near_q.shape[1:3], inputs.v.shape[1]
    i = sampled[(sampled >= keys - queries) & (sampled < keys)]
    if not len(i):
        return torch.tensor([0.0, 0.0, 0.0, -torch.inf], device=i.device)
    own, distance = i - (keys - queries), i[:, None] - torch.arange(keys, device=i.device)
    scores, seen = _scores(inputs.near_q[0, own], inputs.near_k[0], n), distance >= 0
    if inputs.far_q is not None and inputs.far_k is not None:
        assert window is not None
        scores = torch.where(distance < window, scores, _scores(inputs.far_q[0, own], inputs.far_k[0], n))
    elif window is not None:
        seen = seen & (distance < window)
    scores = (scores * scale).masked_fill(~seen, float("-inf"))
    p = scores.softmax(dim=-1)
    entropy = -torch.special.xlogy(p, p).sum(dim=-1)
    concentration = (p.square().sum(dim=-1) * seen.sum(dim=-1)).rsqrt()
    return torch.stack((entropy.sum(), concentration.sum(), torch.full_like(scores[0, 0, 0], entropy.numel()), scores.max()))


def _scores(q: Tensor, k: Tensor, n: int) -> Tensor:
    """[n, queries, S] in float32 from q [queries, n, H] and k [S, kv heads, H]."""
    k = k.repeat_interleave(n // k.shape[1], dim=1)
    return torch.einsum("inh,jnh->nij", q.float(), k.float())
