"""What surrounds cuDNN's operators, here with the operators by definition: heads before tokens, grouped keys as they are."""

import pytest

from model.attention.kernels import cudnn, three_calls
from model.attention.kernels.cudnn import Cudnn
from tests.model.attention.kernels.cases import DenseFlash, check_backend, random_inputs, widened


class DenseCudnn:
    @staticmethod
    def _transposed(*tensors):
        return [x.transpose(1, 2) for x in tensors]

    @classmethod
    def _scaled_dot_product_cudnn_attention(cls, q, k, v, bias, keep, dropout, causal, debug, *, scale):
        assert bias is None and keep and causal and not dropout and not debug
        out, lse, *_ = DenseFlash._flash_attention_forward(
            *cls._transposed(q, k, widened(v, q)), None, None, 0, 0, 0.0, True, False, scale=scale
        )
        return out[..., : v.shape[-1]].transpose(1, 2), lse[..., None], *[None] * 7

    @classmethod
    def _scaled_dot_product_cudnn_attention_backward(
        cls, grad, q, k, v, out, lse, seed, offset, bias, cum_q, cum_k, max_q, max_k, dropout, causal, *, scale
    ):
        assert bias is None and cum_q is None and cum_k is None and causal and max_q == max_k == q.shape[2]
        wide = cls._transposed(widened(grad, q), q, k, widened(v, q), widened(out, q))
        d_q, d_k, d_v = DenseFlash._flash_attention_backward(
            *wide, lse[..., 0], None, None, 0, 0, 0.0, True, None, None, scale=scale
        )
        return tuple(cls._transposed(d_q, d_k, d_v[..., : v.shape[-1]]))


@pytest.mark.parametrize("far", [True, False])
def test_composition_around_the_cudnn_operators(monkeypatch, far):
    """Four query heads share two key heads, which reach the operators as they are."""
    monkeypatch.setattr(cudnn, "aten", DenseCudnn)
    check_backend(
        lambda *arguments: three_calls.forward(Cudnn(), *arguments),
        lambda *arguments: three_calls.backward(Cudnn(), *arguments),
        random_inputs(50, far), 13,
    )  # fmt: skip
