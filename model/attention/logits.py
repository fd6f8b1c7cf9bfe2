"""Which rows of weights make the logits of a head: what QK-Clip multiplies (trainer/optimizers/qk_clip.py)."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogitRows:
    """How the R rows of a full weight follow the logits: to multiply those of head h by f, row r of its head is multiplied by
    f ** power_R[r]."""

    head_R: Tensor
    """Query head of each row, int64."""
    power_R: Tensor
    """Float64; 0 = the row stays."""

    @classmethod
    def of_heads(cls, heads: int, *parts: tuple[int, float]) -> "LogitRows":
        """Rows of one head after another, in each the same parts: (rows, power)."""
        rows, powers = zip(*parts, strict=True)
        with torch.device("cpu"):  # networks are made on the device of the run
            head_R = torch.arange(heads).repeat_interleave(sum(rows))
            power = torch.tensor(powers, dtype=torch.float64).repeat_interleave(torch.tensor(rows))
        return cls(head_R, power.repeat(heads))
