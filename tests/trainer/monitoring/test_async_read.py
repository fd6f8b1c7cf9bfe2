"""Scalars are read back without waiting for what comes after them."""

from typing import Any

import pytest
import torch

from trainer.monitoring.async_read import AsyncRead


@pytest.mark.gpu
def test_a_read_does_not_wait_for_what_is_queued_after_it() -> None:
    value, busy = torch.full((), 3.0, device="cuda"), torch.cuda.Event()
    read = AsyncRead(value, value > 1)
    torch.cuda._sleep(1 << 32)  # a second or more
    busy.record()
    assert read.read() == [3.0, 1.0]
    assert not busy.query()


def test_values_of_a_cpu() -> None:
    assert AsyncRead(torch.tensor(2.5), torch.tensor(True)).read() == [2.5, 1.0]


def test_values_of_a_collective_are_read_when_it_is_done() -> None:
    value = torch.zeros(())

    class Work:
        def wait(self) -> Any:
            value.fill_(7.0)

    assert AsyncRead(value, work=Work()).read() == [7.0]
