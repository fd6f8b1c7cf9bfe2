"""Scales of the queries: log n and YaRN's."""

import torch

from model.positions.config import PositionConfig
from model.positions.log_n import query_scale


def test_log_n_of_the_post():
    """Trained at 512 (Su 2021, kexue.fm/archives/8823)."""
    n = torch.tensor([1, 2, 16, 512, 513, 1024, 4096])
    trained = query_scale(PositionConfig(log_n="trained"), n - 1, 512)
    clipped = query_scale(PositionConfig(log_n="inference"), n - 1, 512)
    want = torch.tensor([0, 0.1111, 0.4444, 1, 1.0003, 1.1111, 1.3333], dtype=torch.float64)
    torch.testing.assert_close(trained, want, rtol=0, atol=1e-4)
    torch.testing.assert_close(clipped, want.clamp(min=1), rtol=0, atol=1e-4)
