"""FlexAttention's masks and the merge around them against the definition, in eager mode."""

import pytest
import torch

from model.attention.kernels import flex
from model.attention.kernels.reference import reference_attention
from tests.model.attention.kernels.cases import CHUNKS, chunk, packed, random_inputs


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("boundaries", [None, (0, 40, 65, 80, 130)])
@pytest.mark.parametrize("far", [True, False])
def test_flex_masks(boundaries, far):
    inputs = random_inputs(65, far, H=16, Hv=16, dtype=torch.float32).map(torch.Tensor.detach)
    documents = None if boundaries is None else packed(*boundaries)
    got, want = flex.flex_attend_with_lse(inputs, 0.3, 20, documents), reference_attention(inputs, 0.3, 20, documents)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert torch.equal(flex.flex_attend(inputs, 0.3, 20, documents), got[0])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("queries", [1, 100])
@pytest.mark.parametrize("case", CHUNKS)
def test_the_last_tokens_of_rows(case, queries):
    far, window, boundaries = CHUNKS[case]
    inputs, documents = chunk(700, queries, far, window, boundaries, n=2, k=1, H=16, Hv=16, dtype=torch.float32)
    inputs = inputs.map(torch.Tensor.detach)
    got, want = flex.flex_attend_with_lse(inputs, 0.3, window, documents), reference_attention(inputs, 0.3, window, documents)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
