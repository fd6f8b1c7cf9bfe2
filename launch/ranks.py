"""Ranks of this computer: torchrun inside this process, so that a signal to it reaches them and no traceback of its own
hides what they said."""

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args
from torch.distributed.run import run as torchrun

from launch import runtime


def run_ranks(ranks: int, max_restarts: int, grace_seconds: float, arguments: list[str]) -> int:
    """Run `launch.train` with `arguments` on `ranks` ranks; the exit status.

    0 done; a rank's own if one failed, which has said why; 128 + number when a signal ended it, after every rank saved
    and left or `grace_seconds` were over.

    Raises:
        ValueError: fewer than no restarts.
    """
    if max_restarts < 0:
        raise ValueError(f"--max-restarts must be at least 0, got {max_restarts}")
    runtime.set_environment(runtime.rank_environment(ranks, grace_seconds))
    options = ["--standalone", f"--nproc-per-node={ranks}", f"--max-restarts={max_restarts}"]
    options += [f"--signals-to-handle={runtime.TORCHRUN_SIGNALS}", "-m", "launch.train", *arguments]
    try:
        torchrun(parse_args(options))
    except SignalException as ended:
        return 128 + ended.sigval
    except ChildFailedError as failed:
        status = failed.get_first_failure()[1].exitcode
        return status if status > 0 else 128 - status  # ended by a signal: as a shell tells it
    return 0
