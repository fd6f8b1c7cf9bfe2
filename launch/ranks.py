"""`tiglon train`: one rank in this process, or several with torchrun inside it, so that a signal to it reaches them and
no traceback of torchrun's hides what they said."""

from typing import Annotated

import typer
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args
from torch.distributed.run import run as torchrun

from launch import runtime
from launch.config import load, micro_batches
from launch.start import check_start
from launch.train import main as train_main
from launch.train import open_data


def train_command(
    config: Annotated[str, typer.Argument(help="TOML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value ...")] = None,
    nproc: Annotated[int, typer.Option(help="Ranks on this computer; more than one goes through torchrun.")] = 1,
    max_restarts: Annotated[int, typer.Option(help="Restarts of the ranks after a failure; they resume.")] = 0,
) -> None:
    """Train, or carry on training.

    Example: tiglon train launch/configs/quickstart.toml --nproc 2 train.steps=100
    """
    arguments = [config, *(overrides or [])]
    if nproc == 1 and not max_restarts:
        raise typer.Exit(train_main(arguments))
    settings = load(config, overrides or [])
    micro_batches(settings, nproc)
    # a mistake is told once, before any rank starts
    first = runtime.World(rank=0, local_rank=0, world_size=nproc, local_world_size=nproc, restarts=0, launched=False)
    data = open_data(settings, 0, nproc)
    check_start(settings, first, runtime.choose_device(settings.run.device, first), data.train)
    data.close()
    raise typer.Exit(run_ranks(nproc, max_restarts, settings.health.grace_seconds, arguments))


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
