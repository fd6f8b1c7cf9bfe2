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
        Output [B, C, n, Hv] and natural log-sum-exp of the scaled scores [B, C, n].
    """
    B, C, n, _ = inputs.near_q.shape
    group, S = n // inputs.near_k.shape[2], inputs.tokens
    position_S = torch.arange(S, device=inputs.v.device)
    distance_CS = position_S[S - C :, None] - position_S
    scores_BnCS, visible = _scores(inputs.near_q, inputs.near_k, group), distance_CS >= 0
    if inputs.far_q is not None and inputs.far_k is not None:
        assert window is not None
        scores_BnCS = torch.where(distance_CS < window, scores_BnCS, _scores(inputs.far_q, inputs.far_k, group))
    elif window is not None:
        visible = visible & (distance_CS < window)
    if documents is not None:
        document_B1S = document_ids(documents, B, S)[:, None]
        visible = visible & (document_B1S[..., S - C :, None] == document_B1S[..., None, :])
    scores_BnCS = (scores_BnCS * scale).masked_fill(~visible, float("-inf"))
    out_BnCH = scores_BnCS.softmax(dim=-1) @ inputs.v.transpose(1, 2).repeat_interleave(group, dim=1)
    return out_BnCH.transpose(1, 2), scores_BnCS.logsumexp(dim=-1).transpose(1, 2)


def _scores(q_BCnH: Tensor, k_BSkH: Tensor, group: int) -> Tensor:
    return q_BCnH.transpose(1, 2) @ k_BSkH.transpose(1, 2).repeat_interleave(group, dim=1).transpose(-1, -2)
