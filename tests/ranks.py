"""Several ranks on this computer: processes of their own, gloo, a file for rendezvous, a hard timeout."""

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["torch", "torch.distributed", "tests.preload"])


def _rank(function: Callable, rank: int, world_size: int, rendezvous: str, args: tuple, answer: Connection) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)  # DeepSpeed asks for it
    try:
        if rendezvous.isdigit():
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=rendezvous, TORCHELASTIC_USE_AGENT_STORE="True")
            answer.send((True, function(rank, world_size, *args)))
            return
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
        answer.send((True, function(rank, world_size, *args)))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        answer.send((False, traceback.format_exc()))
        raise SystemExit(1) from None


def run_ranks(
    function: Callable,
    world_size: int,
    *args: Any,
    timeout_seconds: float = 120,
    grouped: bool = True,
    method: Literal["forkserver", "spawn"] = "forkserver",
) -> list[Any]:
    """Run `function(rank, world_size, *args)` on every rank; return what the ranks returned, in order.

    Args:
        grouped: start a gloo group; else give each rank the environment that torchrun would, and nothing more.
        method: how processes start. The fork server has the slow imports done, DeepSpeed among them, which asks whether
            there is a GPU: a process forked after that question cannot use one, so ranks on GPUs are spawned.

    Raises:
        AssertionError: with the traceback of the first rank that failed, died or did not answer in time.
    """
    context = _server if method == "forkserver" else multiprocessing.get_context(method)
    with tempfile.TemporaryDirectory() as folder:
        board = None if grouped else dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        rendezvous = str(Path(folder) / "rendezvous") if board is None else str(board.port)
        answers, processes = [], []
        for rank in range(world_size):
            receive, send = context.Pipe(duplex=False)
            process = context.Process(target=_rank, args=(function, rank, world_size, rendezvous, args, send), daemon=True)
            process.start()
            send.close()
            answers.append(receive)
            processes.append(process)
        try:
            return _collect(answers, time.monotonic() + timeout_seconds)
        finally:
            for process in processes:
                process.join(5)
                if process.is_alive():
                    process.kill()
                    process.join()


def _collect(answers: list[Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(answers):
        open_ranks = {answers[rank]: rank for rank in range(len(answers)) if rank not in results}
        ready = wait(list(open_ranks), timeout=max(0.0, deadline - time.monotonic()))
        assert ready, f"ranks {sorted(open_ranks.values())} did not answer in time"
        for connection in ready:
            rank = open_ranks[connection]
            try:
                fine, value = connection.recv()
            except EOFError:
                fine, value = False, "the process died without a word"
            assert fine, f"rank {rank} failed:\n{value}"
            results[rank] = value
    return [results[rank] for rank in range(len(answers))]
