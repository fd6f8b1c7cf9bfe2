"""YaRN's frequencies against the table of the post, and its scale of the queries."""

import pytest
import torch

from model.positions.config import PositionConfig
from model.positions.log_n import query_scale


@pytest.mark.parametrize(
    "settings, golden",
    [
        ({"kind": "yarn"}, [1, 0.0326778756, 0.00125, 0.000125]),
        ({"kind": "yarn", "yarn_ramp": "index"}, [1, 0.05625, 0.00125, 0.000125]),
    ],
)
def test_frequencies_of_the_posts(settings, golden):
    """d = 8, base 1e4, s = 8, trained at 512 (Su 2023, kexue.fm/archives/9948)."""
    got = PositionConfig(factor=8, **settings).map.frequencies(8, 512)
    torch.testing.assert_close(got, torch.tensor(golden, dtype=torch.float64), rtol=1e-8, atol=0)


def test_yarn_scales_the_logits():
    scale = query_scale(PositionConfig(kind="yarn", factor=8), torch.tensor([0]), 512)
    assert float(scale) == pytest.approx(1.45912908, rel=1e-8)
