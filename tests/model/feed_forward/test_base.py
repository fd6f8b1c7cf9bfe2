"""Every kind of feed-forward layer answers what is asked of it."""

import pytest

from model.config import FEED_FORWARD, ModelConfig
from model.feed_forward.base import FeedForward
from model.feed_forward.moe import MixtureOfExperts
from model.parallel.layers import Kit
from model.sublayer import Execution


def _copied(layer: FeedForward) -> int:
    """Elements of a token's copies for its experts, which every rank has whole."""
    return layer.chosen * layer.hidden_size if isinstance(layer, MixtureOfExperts) else 0


@pytest.mark.parametrize("kind", FEED_FORWARD)
def test_a_rank_has_its_share(kind: str):
    whole, half = (FEED_FORWARD[kind](ModelConfig(), Kit(size=size)) for size in (1, 2))
    assert half.local_width * 2 == whole.local_width
    assert half.pointwise_elements() * 2 == whole.pointwise_elements() + 4 * _copied(whole)
    for execution in (Execution(2), Execution(2, compiled=True)):
        kept, of_half = whole.kept(execution, 16), half.kept(execution, 16)
        assert 0 < kept.products <= kept.everything and of_half.inside_experts * 2 == kept.inside_experts
        unsplit = of_half.everything * 2 - kept.everything
        assert unsplit > 2 * _copied(whole) if kind == "moe" else unsplit == 0
    assert whole.matrix_flops() == half.matrix_flops(), "over all ranks"


@pytest.mark.parametrize("kind", FEED_FORWARD)
def test_its_last_matrix_starts_as_residual_branches_do(kind: str):
    layer = FEED_FORWARD[kind](ModelConfig(residual_init="plain", initializer_range=0.5), Kit())
    assert {weight.spec.initial.std for weight in layer.parameters()} == {0.5}  # type: ignore[attr-defined]
