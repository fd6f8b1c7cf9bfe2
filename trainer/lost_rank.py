"""Recognizes the errors by which libraries report that another rank is gone."""

import re

import torch.distributed as dist

_MESSAGES = ("Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe", "Timed out waiting")


def lost_rank_message(error: BaseException) -> str:
    """The first words of an error about a broken connection to another rank; empty for any other error."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    broken = isinstance(error, RuntimeError) and any(message in line for message in _MESSAGES)
    if not (broken or isinstance(error, dist.DistError)):
        return ""
    # gloo begins with a position in its source and ends with a guess at the cause
    return re.sub(r"^\[[^]]*\] ", "", line).partition(". ")[0]
