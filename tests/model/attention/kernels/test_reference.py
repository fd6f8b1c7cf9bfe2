"""The definition, token by token in plain Python."""

import math

import pytest
import torch

from model.attention.kernels.reference import reference_attention
from tests.model.attention.kernels.cases import packed, random_inputs


@pytest.mark.parametrize("boundaries", [None, (0, 4, 9, 13, 18)])
@pytest.mark.parametrize(("far", "window"), [(False, None), (False, 3), (True, 3), (True, 9)])
@pytest.mark.parametrize("queries", [1, 4, 9])
def test_the_last_tokens_see_what_they_see_among_all(queries, far, window, boundaries):
    inputs, documents = random_inputs(9, far), None if boundaries is None else packed(*boundaries)
    last = inputs.part(slice(None), slice(9 - queries, None), slice(None))
    whole, some = (reference_attention(x, 0.3, window, documents) for x in (inputs, last))
    for all_tokens, last_tokens in zip(whole, some, strict=True):
        torch.testing.assert_close(last_tokens, all_tokens[:, 9 - queries :], rtol=0, atol=1e-14)


@pytest.mark.parametrize("boundaries", [None, (0, 4, 9, 13, 18)])
@pytest.mark.parametrize(("far", "window"), [(False, None), (False, 3), (True, 3)])
def test_every_output_is_a_mean_of_the_values_that_the_query_sees(far, window, boundaries):
    inputs = random_inputs(9, far)
    out, lse = reference_attention(inputs, 0.3, window, None if boundaries is None else packed(*boundaries))
    edges = boundaries or (0, 9, 18)
    for b, i, head in [(0, 0, 0), (0, 5, 1), (0, 8, 3), (1, 3, 2), (1, 8, 0)]:
        start = max(edge for edge in edges if edge <= 9 * b + i) - 9 * b
        weights = []
        for j in range(max(0, start), i + 1):
            is_near = window is None or i - j < window
            if not is_near and not far:
                continue
            q, k = (inputs.near_q, inputs.near_k) if is_near else (inputs.far_q, inputs.far_k)
            score = 0.3 * sum(x * y for x, y in zip(q[b, i, head].tolist(), k[b, j, head // 2].tolist(), strict=True))
            weights.append((j, math.exp(score)))
        total = sum(weight for _, weight in weights)
        assert lse[b, i, head].item() == pytest.approx(math.log(total), abs=1e-12)
        for channel in range(6):
            mean = sum(weight * inputs.v[b, j, head // 2, channel].item() for j, weight in weights) / total
            assert out[b, i, head, channel].item() == pytest.approx(mean, abs=1e-12)
