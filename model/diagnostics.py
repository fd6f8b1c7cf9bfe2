"""What attention does, on request: entropy, concentration and the largest logit of every layer, from a few queries."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.decoder import Decoder
from model.heads import Heads
from model.parallel import Topology

QUERIES = 64


@dataclass(frozen=True)
class Look:
    """Attention of one layer, averaged over heads and queries."""

    entropy: float
    """Of a row of probabilities, in nats; log n when all n visible tokens count alike."""
    concentration: float
    """S(a) = mean a / sqrt(mean a^2) over visible tokens: 1 = spread evenly, small = on few (kexue 9889)."""
    largest_logit: float
    """Largest scaled score of any pair."""


@torch.no_grad()
def look(decoder: Decoder, inputs_BS: Tensor, topology: Topology, queries: int = QUERIES) -> list[Look]:
    """Look at every layer while it reads the first sequence of a batch; costs one forward of that sequence.

    Args:
        decoder: the network; every rank that shares it calls.
        inputs_BS: token ids.
        topology: where this rank stands; heads of all tensor-parallel ranks count.
        queries: tokens looked from, evenly spaced over the sequence.
    """
    # another shape would make compiled blocks compile again, and sequence parallelism could not divide it
    with torch.compiler.set_stance("force_eager"), decoder.kit.tokens_whole():
        how = decoder.read(1, inputs_BS.shape[1])
        x_TD = decoder.model.embed_tokens(inputs_BS[0])
        found = []
        block: Any
        for block in decoder.model.layers:
            layer = block.self_attn
            heads = layer.rotated(block.input_layernorm(x_TD), how)
            found.append(measure(heads, layer.scale, layer.place.window(how), queries))
            x_TD = block(x_TD, how)
    all_layers = torch.stack(found)
    if topology.tensor_group is not None:
        largest = all_layers[:, 2].contiguous()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=topology.tensor_group)
        topology.sum(all_layers, topology.tensor_group)
        all_layers = torch.cat((all_layers[:, :2] / topology.tensor_parallel_size, largest[:, None]), dim=1)
    return [Look(*values) for values in all_layers.tolist()]


def measure(heads: Heads, scale: float, window: int | None, queries: int = QUERIES) -> Tensor:
    """Entropy, concentration and largest logit, float32 [3], of one sequence; arguments as model.heads.reference."""
    S, n = heads.near_q.shape[1:3]
    i = torch.linspace(0, S - 1, min(queries, S), device=heads.v.device).round().long()
    distance = i[:, None] - torch.arange(S, device=i.device)
    scores, seen = _scores(heads.near_q[0, i], heads.near_k[0], n), distance >= 0
    if heads.far_q is not None and heads.far_k is not None:
        assert window is not None
        scores = torch.where(distance < window, scores, _scores(heads.far_q[0, i], heads.far_k[0], n))
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
