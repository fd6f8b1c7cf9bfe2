"""Host memory of exactly the size asked for that the GPU writes to directly (page-locked, "pinned").

torch's own pinned tensors come in powers of two: 128 GiB for a state of 66.
"""

import importlib
import inspect
import logging
import mmap
from collections.abc import Callable
from contextlib import suppress

import torch

log = logging.getLogger(__name__)

_MODULE = "torch.cuda._pin_memory_utils"
_FUNCTIONS = {"pin_memory": ("data_ptr", "size"), "unpin_memory": ("data_ptr",)}


def torch_pin_functions() -> tuple[Callable[[int, int], None], Callable[[int], None]]:
    """torch's functions that page-lock memory (address, bytes) and undo that (address). They are private: CUDA's host
    registration has no public name in torch.

    Raises:
        RuntimeError: in one sentence, where this version of torch lacks them.
    """
    functions = []
    for name, parameters in _FUNCTIONS.items():
        try:
            function = getattr(importlib.import_module(_MODULE), name)
        except (ImportError, AttributeError):
            function = None
        if function is None or tuple(inspect.signature(function).parameters) != parameters:
            raise RuntimeError(
                f"torch {torch.__version__} has no {_MODULE}.{name}({', '.join(parameters)}), by which "
                "trainer/checkpoint/pinned_memory.py page-locks the copies of checkpoints; call what has replaced it"
            )
        functions.append(function)
    return functions[0], functions[1]


def pin(buffer: torch.Tensor, gpu: torch.device) -> bool:
    """Page-lock a buffer; whether that worked. Without it copies from the GPU are slower, which is logged."""
    if not buffer.numel():
        return False
    try:
        torch_pin_functions()[0](buffer.data_ptr(), buffer.numel())
    except (RuntimeError, AssertionError) as error:  # a limit on locked memory, mostly
        log.warning("%.1f GB for checkpoints cannot be pinned, so copies take longer: %s", buffer.numel() / 1e9, error)
        with suppress(RuntimeError, AssertionError):  # CUDA reports a failed call again, to whoever calls next
            torch.zeros(1, device=gpu)
        return False
    return True


def unpin(buffer: torch.Tensor) -> None:
    """Undo `pin` where it worked."""
    torch_pin_functions()[1](buffer.data_ptr())


def huge_pages(size: int) -> torch.Tensor:
    """Fresh memory (bytes) in pages of 2 MiB: with those of 4 KiB most of the first copy would go into page faults."""
    if not size:
        return torch.empty(0, dtype=torch.uint8)
    memory = mmap.mmap(-1, size)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
