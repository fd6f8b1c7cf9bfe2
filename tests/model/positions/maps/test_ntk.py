"""Frequencies of NTK and NTK-mixed against the tables of the posts."""

import pytest
import torch

from model.positions.config import PositionConfig


@pytest.mark.parametrize(
    "settings, golden",
    [
        ({"kind": "ntk"}, [1, 0.05, 0.0025, 0.000125]),
        ({"kind": "ntk-mixed", "mixed_exponent": 1}, [0.594603558, 0.0353553391, 0.00210224104, 0.000125]),
        ({"kind": "ntk-mixed"}, [0.417154981, 0.0259668095, 0.00176005376, 0.000125]),
        ({"kind": "ntk-mixed", "mixed_exponent": 0.75}, [0.479412632, 0.0290415292, 0.00187143605, 0.000125]),
        ({"kind": "ntk-mixed", "mixed_exponent": 0}, [0.125, 0.0125, 0.00125, 0.000125]),
    ],
)
def test_frequencies_of_the_posts(settings, golden):
    """d = 8, base 1e4, s = 8, trained at 512 (Su 2023, kexue.fm/archives/9675 and 9706)."""
    got = PositionConfig(factor=8, **settings).map.frequencies(8, 512)
    torch.testing.assert_close(got, torch.tensor(golden, dtype=torch.float64), rtol=1e-8, atol=0)
