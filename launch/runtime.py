"""The process and its surroundings: ranks, cores, device, process group, screen. The only reader of the environment, with
launch/program.py."""

import ctypes
import io
import logging
import math
import os
import secrets
import shutil
import signal
import site
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, TextIO, cast

import torch
import torch.distributed as dist

from launch.interrupts import LAUNCHER
from trainer.monitoring.signals import SIGNALS

LOST = "TIGLON_LOST"
"""The variable of World.lost."""


@dataclass(frozen=True)
class World:
    """This process among the ranks, as torchrun (or its like) describes it."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    restarts: int
    """How often torchrun has restarted the ranks."""
    launched: bool
    """Whether torchrun (or its like) started this process."""
    lost: str = ""
    """After a restart by `tiglon train`: which rank was killed, if one was."""
    launch: str = ""
    """torchrun's name for all the ranks that it started together and starts again; "" where it has none of its own."""

    @property
    def elastic(self) -> bool:
        """Whether torchrun watches this process: it takes any status but 0 for a failure, and starts the ranks again."""
        return self.launched and "TORCHELASTIC_RUN_ID" in os.environ

    def shares_node_with(self, rank: int) -> bool:
        """Whether a rank runs on this computer."""
        return rank // self.local_world_size == self.rank // self.local_world_size


ALONE = World(rank=0, local_rank=0, world_size=1, local_world_size=1, restarts=0, launched=False)


def environment() -> Mapping[str, str]:
    """The environment, for those who describe it (doctor) or hand it on (launching)."""
    return os.environ


def set_environment(values: Mapping[str, str]) -> None:
    """Change the environment that processes started here inherit."""
    os.environ.update(values)


def world() -> World:
    """Read what torchrun put into the environment; a lone process is rank 0 of 1.

    Raises:
        ValueError: its variables contradict each other.
    """
    variables = os.environ
    numbers = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "TORCHELASTIC_RESTART_COUNT": 0}
    given = {name: _count(name) for name in numbers if variables.get(name)}
    numbers |= given
    rank, size = numbers["RANK"], numbers["WORLD_SIZE"]
    if "RANK" not in given and size > 1:
        raise ValueError(
            f"WORLD_SIZE = {size} is set but RANK is not, so this process cannot know which rank it is; start the ranks with "
            "torchrun or tiglon train --nproc, or unset WORLD_SIZE"
        )
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not variables.get(name)]
    if missing and max(rank, size - 1) > 0:
        raise ValueError(
            f"RANK = {rank} is set and {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not; start the ranks "
            "with torchrun or tiglon train --nproc, or unset RANK"
        )
    for part, whole in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE"), ("LOCAL_WORLD_SIZE", "WORLD_SIZE")):
        most = numbers[whole] - (part in ("RANK", "LOCAL_RANK"))
        if part in given and whole in given and numbers[part] > most:
            raise ValueError(
                f"{part} = {numbers[part]} and {whole} = {numbers[whole]} contradict each other: {part} is at most {most}; "
                "start the ranks with torchrun, or unset what another launcher has left in the environment"
            )
    run = variables.get("TORCHELASTIC_RUN_ID", "")
    return World(
        rank=numbers["RANK"],
        local_rank=numbers["LOCAL_RANK"],
        world_size=numbers["WORLD_SIZE"],
        local_world_size=numbers["LOCAL_WORLD_SIZE"],
        restarts=numbers["TORCHELASTIC_RESTART_COUNT"],
        launched="RANK" in given,
        lost=variables.get(LOST, ""),
        launch="" if run == "none" else run,
    )


def _count(name: str) -> int:
    try:
        value = int(os.environ[name])
    except ValueError:
        value = -1
    if value < (name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")):
        raise ValueError(
            f"the environment has {name} = '{os.environ[name]}', not a number of ranks; torchrun sets it, unset it elsewhere"
        )
    return value


def cores() -> int:
    """Cores this process may use: fewer than there are under SLURM, taskset or in a container."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


TORCHRUN_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
"""What torchrun is to hand on to its ranks: its own choice, and SIGUSR1."""


def torchrun_patience(grace_seconds: float) -> str:
    """TORCH_ELASTIC_SHUTDOWN_TIMEOUT: seconds that torchrun leaves its ranks after a stop signal before it kills them."""
    return str(math.ceil(grace_seconds))


def rank_environment(ranks: int, grace_seconds: float = 30.0) -> dict[str, str]:
    """The environment for ranks started here: threads, glibc's allocator, torchrun's patience. What the user has set stays.

    glibc returns large buffers to the system and gets new ones, page by page, at every step; kept, and in huge pages, they
    save 8 % of the CPU time of a small network (benchmarks/LOG.md).
    """
    memory = {
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(1 << 33),
        "MALLOC_TOP_PAD_": str(1 << 28),
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    }
    threads = {"OMP_NUM_THREADS": str(max(1, cores() // ranks))}
    patience = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": torchrun_patience(grace_seconds)}
    return {**threads, **memory, **patience, **os.environ, **import_path()}


def choose_device(device: str, world: World) -> torch.device:
    """The device of this rank.

    Raises:
        ValueError: an unknown device, or cuda where there is none.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"the device '{device}' is unknown; legal: auto, cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("run.device = 'cuda', but torch finds no CUDA device here; use run.device=cpu or auto")
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", world.local_rank % torch.cuda.device_count())


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


def memory_capacity_bytes(device: torch.device, world: World) -> float:
    """Memory a rank may count on: its GPU's, or its share of this computer's."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / world.local_world_size


def prepare_process(device: torch.device, world: World, deterministic: bool = False) -> None:
    """Threads, allocator, warnings and run.deterministic, before any heavy import uses them."""
    if device.type == "cuda":
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ or world.launched:
        torch.set_num_threads(max(1, cores() // world.local_world_size))
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # DeepSpeed asks for it
    if deterministic:
        _choose_deterministic_kernels()
    warnings.filterwarnings("ignore")  # of libraries, for the whole process: none is about what a user can change


def _choose_deterministic_kernels() -> None:
    """Ask for deterministic kernels; an operation that has none raises."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # with one workspace per stream, products are split alike
    os.environ.setdefault("TORCHINDUCTOR_DETERMINISTIC", "1")  # its choices do not follow a measurement
    torch.use_deterministic_algorithms(True)
    fill_nothing: Any = torch.utils.deterministic
    fill_nothing.fill_uninitialized_memory = False  # a debugging aid that writes every new tensor once more


@contextmanager
def restored_process() -> Iterator[None]:
    """Afterwards put back what training changes of its process: signal handlers, environment, warning filters, logging,
    excepthook, torch's threads and choice of kernels."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    variables, root, excepthook = dict(os.environ), logging.getLogger(), sys.excepthook
    log_handlers, level = root.handlers, root.level
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    fills: Any = torch.utils.deterministic
    fill = fills.fill_uninitialized_memory
    root.handlers = []  # else basicConfig would close them
    try:
        with warnings.catch_warnings():
            yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.environ.clear()
        os.environ.update(variables)
        sys.excepthook = excepthook  # torch's, from the first process group on, puts the rank before each line
        root.handlers = log_handlers
        root.setLevel(level)
        torch.set_num_threads(threads)
        if deterministic != torch.are_deterministic_algorithms_enabled():  # the call imports the compiler
            torch.use_deterministic_algorithms(deterministic)
        fills.fill_uninitialized_memory = fill


def join_process_group(device: torch.device, world: World, timeout_seconds: int) -> None:
    """Start the process group (nccl on GPU, gloo on CPU). A lone process makes a group of one."""
    patience = timedelta(seconds=timeout_seconds)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if not world.launched or (world.world_size == 1 and "MASTER_ADDR" not in os.environ):
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=patience)
    elif os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = _own_store(world, patience)
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.world_size, timeout=patience)
    else:
        dist.init_process_group(backend, timeout=patience)


def _own_store(world: World, patience: timedelta) -> dist.Store:
    """A key-value store of this attempt alone, served by rank 0.

    The store that torchrun offers outlives restarts and still holds the addresses of ranks that died (torch 2.13), to
    which new ranks would try to connect. A port published by an earlier rank 0 answers nobody, so ranks ask again.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agent_store = dist.TCPStore(host, port, is_master=False, timeout=patience)
    if world.rank == 0:
        server = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=patience)
        token = secrets.token_hex(8)
        server.set("tiglon/token", token)
        agent_store.set("tiglon/store", f"{server.port} {token}")
        return server
    deadline = time.monotonic() + patience.total_seconds()
    while time.monotonic() < deadline:
        port_text, token = agent_store.get("tiglon/store").decode().split()
        try:
            client = dist.TCPStore(host, int(port_text), is_master=False, wait_for_workers=False, timeout=timedelta(seconds=5))
            if client.get("tiglon/token").decode() == token:
                client.set_timeout(patience)
                return client
        except dist.DistError:
            time.sleep(0.2)
    raise ValueError(f"rank {world.rank} found no rank 0 at {host} within {patience.total_seconds():.0f} s; look at its log")


def leave_process_group() -> None:
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


class Screen(io.TextIOBase):
    """The terminal, pipe or file that people look at. When it is gone (a closed pipe or terminal) the run continues.

    A character that its encoding lacks is written as its escape.
    """

    def __init__(self, descriptor: int, encoding: str) -> None:
        self._descriptor, self._encoding = descriptor, encoding

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding

    def write(self, text: str) -> int:
        left = text.encode(self._encoding, errors="backslashreplace")
        with suppress(OSError):
            while left:
                left = left[os.write(self._descriptor, left) :]
        return len(text)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)


class RedirectedOutput:
    """Redirects everything that this process prints, C libraries included, from the screen to the rank's log.

    Until it is known that the run will start, it goes to a file without a name: a refused start leaves no trace.
    """

    def __init__(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self.screen = cast(TextIO, Screen(os.dup(2), sys.stderr.encoding))
        """stderr as it was, for our own few lines."""
        self._early: IO[bytes] | None = tempfile.TemporaryFile()  # noqa: SIM115 (open until the log takes its place)
        self._redirect(self._early.fileno())
        logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(name)s %(message)s", force=True)

    def to_log(self, log_path: Path) -> Path:
        """Redirect to the rank's log from now on, and copy there what was printed so far; the path.

        Raises:
            ValueError: the log cannot be written.
        """
        if self._early is None:
            return log_path
        make_directory(log_path.parent)
        try:
            log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        except OSError as error:
            raise ValueError(
                f"run.dir: {log_path} cannot be written ({error.strerror}); make it writable or choose another"
            ) from None
        sys.stdout.flush()
        sys.stderr.flush()
        self._early.seek(0)
        with suppress(OSError):  # a full disk
            os.write(log, self._early.read())
        self._redirect(log)
        os.close(log)
        self._early.close()
        self._early = None
        return log_path

    def close(self) -> None:
        """Close what is open; the redirection stays."""
        if self._early is not None:
            self._early.close()
        os.close(self.screen.fileno())

    @staticmethod
    def _redirect(descriptor: int) -> None:
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)


def launcher() -> dict[str, str]:
    """The environment of ranks that this process itself starts."""
    return {LAUNCHER: str(os.getpid())}


def die_with_parent() -> None:
    """Let the kernel kill this process when the one that started it dies, however it dies: no rank is left behind."""
    parent = int(os.environ.get(LAUNCHER, os.getppid()))
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != parent:  # the parent died while this process started
        os._exit(128 + signal.SIGKILL)


_PR_SET_PDEATHSIG = 1


def import_path() -> dict[str, str]:
    """Environment in which Python finds our packages, and not a data.py or model.py of the working directory."""
    root = Path(__file__).resolve().parent.parent
    installed = {Path(path).resolve() for path in (*site.getsitepackages(), site.getusersitepackages())}
    given = os.environ.get("PYTHONPATH", "")
    found = {"PYTHONSAFEPATH": "1"}
    return found if root in installed else {**found, "PYTHONPATH": os.pathsep.join([str(root), *([given] if given else [])])}
