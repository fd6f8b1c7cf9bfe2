"""What libraries raise when another rank is gone is told apart from errors of this rank."""

import pytest
import torch.distributed as dist

from trainer.lost_rank import lost_rank_message


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("[/pytorch/gloo/pair.cc:589] Connection closed by peer [127.0.0.1]:5. It may be gone"),
         "Connection closed by peer [127.0.0.1]:5"),
        (RuntimeError("\n Broken pipe\nmore"), "Broken pipe"),
        (dist.DistBackendError("NCCL error. unhandled"), "NCCL error"),
        (RuntimeError("shapes do not match"), ""),
        (ValueError("Connection refused"), ""),
    ],
)  # fmt: skip
def test_a_broken_connection_is_told_in_few_words(error: Exception, message: str):
    assert lost_rank_message(error) == message
