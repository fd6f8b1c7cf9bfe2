"""The definition of attention, against which every backend is tested."""

import torch
from torch import Tensor

from model.attention.kernels.inputs import AttentionInputs, document_ids
from model.positions.packing import PackedDocuments


def reference_attention(
    inputs: AttentionInputs, scale: float, window: int | None = None, documents: PackedDocuments | None = None
) -> tuple[Tensor, Tensor]:
    """Attention by its definition, with whole matrices of scores; differentiable in any dtype.

    Args:
        inputs: rotated queries and keys, and values.
        scale: multiplies the scores.
        window: with far parts, the distance (tokens) where they take over; without them, the tokens seen, itself included.
        documents: attention stays inside them.

    Returns:
        Output [B, S, n, Hv] and natural log-sum-exp of the scaled scores [B, S, n].
    """
    B, S, n, _ = inputs.near_q.shape
    group = n // inputs.near_k.shape[2]
    position_S = torch.arange(S, device=inputs.v.device)
    distance_SS = position_S[:, None] - position_S
    scores_BnSS, visible = _scores(inputs.near_q, inputs.near_k, group), distance_SS >= 0
    if inputs.far_q is not None and inputs.far_k is not None:
        assert window is not None
        scores_BnSS = torch.where(distance_SS < window, scores_BnSS, _scores(inputs.far_q, inputs.far_k, group))
    elif window is not None:
        visible = visible & (distance_SS < window)
    if documents is not None:
        document_B1S = document_ids(documents, B, S)[:, None]
        visible = visible & (document_B1S[..., :, None] == document_B1S[..., None, :])
    scores_BnSS = (scores_BnSS * scale).masked_fill(~visible, float("-inf"))
    out_BnSH = scores_BnSS.softmax(dim=-1) @ inputs.v.transpose(1, 2).repeat_interleave(group, dim=1)
    return out_BnSH.transpose(1, 2), scores_BnSS.logsumexp(dim=-1).transpose(1, 2)


def _scores(q_BSnH: Tensor, k_BSkH: Tensor, group: int) -> Tensor:
    return q_BSnH.transpose(1, 2) @ k_BSkH.transpose(1, 2).repeat_interleave(group, dim=1).transpose(-1, -2)
