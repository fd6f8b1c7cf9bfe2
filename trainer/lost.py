"""How libraries say that another rank is gone."""

import re

import torch.distributed as dist

MARKS = ("Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe", "Timed out waiting")


def lost_connection(error: BaseException) -> str:
    """What a library says of a connection to another rank that broke, in few words; empty for any other error."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if not isinstance(error, dist.DistError) and not (isinstance(error, RuntimeError) and any(mark in line for mark in MARKS)):
        return ""
    # gloo begins with the place in its source and ends with what may have happened
    return re.sub(r"^\[[^]]*\] ", "", line).partition(". ")[0]
