"""Which kernel attends to two regions, a sliding window or packed documents: what each serves, and which is the fastest.

Whole rows with one region are not asked here: torch chooses for them (model/kernels.py, `plain`).
"""

from functools import lru_cache
from typing import Literal

import torch

Backend = Literal["cpu", "flash-cpu", "flash", "cudnn", "flex"]
Kind = Literal["two regions", "sliding window", "packed documents"]

FASTEST: dict[tuple[Kind, bool], dict[int, Backend]] = {
    ("two regions", False): {0: "flash", 8192: "cudnn"},
    ("two regions", True): {0: "cudnn"},
    ("sliding window", False): {0: "flash", 2048: "cudnn"},
    ("sliding window", True): {0: "cudnn"},
    ("packed documents", False): {0: "flash"},
    ("packed documents", True): {0: "flash"},
}
"""On a GPU, for a kind of attention and whether values are narrower than keys (MLA): the backend to take from a reach
(tokens) on; flash stands in where that one does not serve.

These are estimates for Hopper, until somebody measures: torch's flash kernel reaches half the rate of cuDNN's there, and
cuDNN's squares move more memory. `python -m benchmarks.attention --device cuda --backends` times
every backend that serves and prints this table as measured.
"""


def reach(tokens: int, window: int | None, far: bool) -> int:
    """Tokens that the last query of a row of `tokens` sees."""
    return tokens if window is None or far else min(window, tokens)


def fused(dtype: torch.dtype, width: int) -> bool:
    """Whether a GPU's fused kernels (flash, cuDNN) take query heads of this width."""
    return dtype in (torch.bfloat16, torch.float16) and width % 8 == 0 and width <= 256


def fastest(kind: Kind, narrow: bool, reached: int) -> Backend:
    """The table's entry for a reach, whether or not this machine serves it."""
    row = FASTEST[kind, narrow]
    return row[max(start for start in row if start <= reached)]


def wants_flex(dtype: torch.dtype, width: int, value_width: int, kind: Kind, reached: int) -> bool:
    """Whether a GPU attends by FlexAttention: outside of the operators, since autograd goes through it."""
    return not fused(dtype, width) or fastest(kind, value_width < width, reached) == "flex"


def choose(
    device: str, dtype: torch.dtype, width: int, value_width: int, kind: Kind, reached: int, *, square: int, compiled: bool
) -> Backend:
    """The backend for two regions, a sliding window or packed documents.

    Args:
        device: "cpu" or "cuda".
        dtype: of queries, keys and values.
        width, value_width: of a query and of a value head.
        kind: what is attended to.
        reached: tokens that the last query of a row sees.
        square: tokens of the smallest of the squares that cuDNN would be given; it is not asked for a single one.
        compiled: whether blocks are compiled: a CPU then has a compiled kernel (model/flash_cpu.py).

    Raises:
        ValueError: no backend serves the device.
    """
    match device:
        case "cpu":
            return "flash-cpu" if compiled else "cpu"
        case "cuda" if wants_flex(dtype, width, value_width, kind, reached):
            return "flex"
        case "cuda":
            found = fastest(kind, value_width < width, reached)
            serves = kind != "packed documents" and square > 1 and cudnn_serves() and not deterministic()
            return found if found != "cudnn" or serves else "flash"
        case _:
            raise ValueError(f"attention has no kernel for device '{device}'; use cpu or cuda")


@lru_cache(maxsize=1)
def cudnn_serves() -> bool:
    """Whether cuDNN is right on this GPU: Hopper and later, after cuDNN 9.15.0.

    Versions 9.11 and 9.12 err in Hopper's backward where values are narrower than keys, and torch itself asks for more
    than 9.15.0 where lengths are no multiple of 128, as squares beside a window are.
    """
    return torch.cuda.get_device_capability() >= (9, 0) and (torch.backends.cudnn.version() or 0) > 91500


def deterministic() -> bool:
    """Whether every kernel has to give the same bits each time (run.deterministic): cuDNN's backward does not."""
    return torch.are_deterministic_algorithms_enabled()
