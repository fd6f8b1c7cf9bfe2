"""Page-locked host memory, and torch's private functions behind it."""

import inspect
from typing import Any

import pytest
import torch
from torch.cuda import _pin_memory_utils

from trainer.checkpoint.pinned_memory import huge_pages, pin, torch_pin_functions


def test_this_torch_has_the_functions_that_pin_memory() -> None:
    """Red in one sentence where a new torch has moved or changed them."""
    try:
        pin_memory, unpin_memory = torch_pin_functions()
    except RuntimeError as error:
        pytest.fail(str(error), pytrace=False)
    assert (pin_memory, unpin_memory) == (_pin_memory_utils.pin_memory, _pin_memory_utils.unpin_memory)
    assert "cudaHostRegister" in inspect.getsource(pin_memory) and "cudaHostUnregister" in inspect.getsource(unpin_memory)


def _with_flags(data_ptr: int, size: int, flags: int) -> None:
    """As a later torch might want it."""


@pytest.mark.parametrize("change", [None, _with_flags])
def test_another_torch_is_one_sentence_and_no_crash(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, change: Any
) -> None:
    """Planted: the function gone, and one with another argument."""
    monkeypatch.setattr(_pin_memory_utils, "pin_memory", change)
    with pytest.raises(RuntimeError, match=r"^torch \S+ has no torch\S+\.pin_memory\(data_ptr, size\), by which"):
        torch_pin_functions()
    assert not pin(huge_pages(4096), torch.device("cuda"))
    assert "cannot be pinned, so copies take longer: torch" in caplog.text


def test_memory_that_cannot_be_pinned_is_used_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(data_ptr: int, size: int) -> None:
        raise RuntimeError("Registering memory failed with cudaError: 2.")

    monkeypatch.setattr(_pin_memory_utils, "pin_memory", refuse)
    assert not pin(huge_pages(4096), torch.device("cuda"))
    assert "0.0 GB for checkpoints cannot be pinned" in caplog.text and "cudaError: 2" in caplog.text


def test_fresh_memory_is_of_the_size_asked_for_and_can_be_written() -> None:
    for size in (0, 1, 5_000_000):
        buffer = huge_pages(size)
        assert buffer.numel() == size and buffer.dtype == torch.uint8
        assert not buffer.any()
        buffer.fill_(7)
