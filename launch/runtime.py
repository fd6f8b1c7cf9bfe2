"""The world a process finds itself in. The only reader of the environment."""

import logging
import math
import os
import secrets
import shutil
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """What torchrun says: who this process is among how many."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    restarts: int
    """How often torchrun has restarted the ranks."""
    launched: bool
    """Whether torchrun (or its like) started this process."""


def environment() -> Mapping[str, str]:
    """The environment, for those who describe it (doctor) or hand it on (launching)."""
    return os.environ


def set_environment(values: Mapping[str, str]) -> None:
    """Change the environment that processes started here inherit."""
    os.environ.update(values)


def world() -> World:
    """Read what torchrun put into the environment; a lone process is rank 0 of 1."""
    found = os.environ
    return World(
        rank=int(found.get("RANK", 0)),
        local_rank=int(found.get("LOCAL_RANK", 0)),
        world_size=int(found.get("WORLD_SIZE", 1)),
        local_world_size=int(found.get("LOCAL_WORLD_SIZE", 1)),
        restarts=int(found.get("TORCHELASTIC_RESTART_COUNT", 0)),
        launched="RANK" in found,
    )


def cores() -> int:
    """Cores this process may use: fewer than there are under SLURM, taskset or in a container."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


TORCHRUN_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
"""What torchrun is to hand on to its ranks: its own choice, and SIGUSR1."""


def torchrun_patience(grace_seconds: float) -> str:
    """TORCH_ELASTIC_SHUTDOWN_TIMEOUT: seconds that torchrun leaves its ranks after a stop signal before it kills them."""
    return str(math.ceil(grace_seconds))


def rank_environment(ranks: int, grace_seconds: float = 30.0) -> dict[str, str]:
    """The environment for ranks started here: cores shared out, memory that stays,
    a torchrun that gives them their grace period.

    glibc gives large buffers back to the system and gets new ones, page by page, at every step; kept, and in huge pages,
    they save 8 % of a small network's processor time (benchmarks/LOG.md). What the user has set stays.
    """
    memory = {
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(1 << 33),
        "MALLOC_TOP_PAD_": str(1 << 28),
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    }
    threads = {"OMP_NUM_THREADS": str(max(1, cores() // ranks))}
    patience = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": torchrun_patience(grace_seconds)}
    return {**threads, **memory, **patience, **os.environ}


def choose_device(device: str, here: World) -> torch.device:
    """The device of this rank.

    Raises:
        ValueError: cuda was asked for and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("run.device = 'cuda', but torch finds no CUDA device here; use run.device=cpu or auto")
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", here.local_rank % torch.cuda.device_count())


def need_compiler(device: torch.device) -> None:
    """Torch compiles with a C++ compiler on a CPU and, through Triton, with a C compiler on a GPU.

    Raises:
        ValueError: there is none.
    """
    cpu = device.type == "cpu"
    names = [os.environ.get("CXX", "g++")] if cpu else [os.environ.get("CC", "gcc"), "clang"]
    if not any(shutil.which(name) for name in names):
        raise ValueError(
            f"train.compile or optimizer.compile = true needs a {'C++' if cpu else 'C'} compiler and {' or '.join(names)} "
            "is not there; install one or leave both off"
        )


def memory_bytes(device: torch.device, here: World) -> float:
    """Memory a rank may count on: its GPU's, or its share of this computer's."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / here.local_world_size


def prepare_process(device: torch.device, here: World) -> None:
    """Threads, allocator and warnings, before any heavy import uses them."""
    if device.type == "cuda":
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ or here.launched:
        torch.set_num_threads(max(1, cores() // here.local_world_size))
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", str(here.local_rank))  # DeepSpeed asks for it
    warnings.filterwarnings("ignore")


def join(device: torch.device, here: World, timeout_seconds: int) -> None:
    """Start the process group (nccl on GPU, gloo on CPU). A lone process makes a group of one."""
    patience = timedelta(seconds=timeout_seconds)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if not here.launched:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=patience)
    elif os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = _own_store(here, patience)
        dist.init_process_group(backend, store=store, rank=here.rank, world_size=here.world_size, timeout=patience)
    else:
        dist.init_process_group(backend, timeout=patience)


def _own_store(here: World, patience: timedelta) -> dist.Store:
    """A key-value store of this attempt alone, served by rank 0.

    The store that torchrun offers outlives restarts and still holds the addresses of ranks that died (torch 2.13), to
    which new ranks would try to connect. A port published by an earlier rank 0 answers nobody, so ranks ask again.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    board = dist.TCPStore(host, port, is_master=False, timeout=patience)
    if here.rank == 0:
        server = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=patience)
        word = secrets.token_hex(8)
        server.set("tiglon/word", word)
        board.set("tiglon/store", f"{server.port} {word}")
        return server
    deadline = time.monotonic() + patience.total_seconds()
    while time.monotonic() < deadline:
        served, word = board.get("tiglon/store").decode().split()
        try:
            client = dist.TCPStore(host, int(served), is_master=False, wait_for_workers=False, timeout=timedelta(seconds=5))
            if client.get("tiglon/word").decode() == word:
                client.set_timeout(patience)
                return client
        except dist.DistError:
            time.sleep(0.2)
    raise ValueError(f"rank {here.rank} found no rank 0 at {host} within {patience.total_seconds():.0f} s; look at its log")


def leave() -> None:
    """Take the process group down, if it is up."""
    if dist.is_initialized():
        dist.destroy_process_group()


def make_directory(path: Path) -> None:
    """Make a directory of the run.

    Raises:
        ValueError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"run.dir: {path} cannot be made ({error.strerror}); choose a place that can be written") from None


def divert_chatter(log_path: Path) -> TextIO:
    """Send everything that is printed in this process, C libraries included, to the rank's log.

    Returns:
        The screen as it was, for our own few lines.

    Raises:
        ValueError: the log cannot be written.
    """
    make_directory(log_path.parent)
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    except OSError as error:
        raise ValueError(
            f"run.dir: {log_path} cannot be written ({error.strerror}); make it writable or choose another"
        ) from None
    screen = os.fdopen(os.dup(2), "w", buffering=1)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(name)s %(message)s", force=True)
    return screen
