"""`tiglon doctor`: check this environment for a configuration."""

import importlib.util
import platform
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.distributed as dist
import typer

from data.corpus.shards import read_corpus_manifest
from launch import runtime
from launch.batches import ahead, micro_batches
from launch.commands.configured import load_begun
from launch.config import RunConfig
from launch.planner.memory import checkpoint_bytes, layout_of, memory
from trainer.monitoring.config import NO_TRACKER, TRACKERS
from trainer.monitoring.progress import format_bytes, plural

PINNED = {"deepspeed": "0.19.8", "megatron-core": "0.16.1"}
TORCH = ((2, 11), (2, 14))
"""Tested versions of torch: from the first, below the second."""


@dataclass(frozen=True)
class Finding:
    """One sentence. A "problem" will stop the run, "advice" will not."""

    kind: Literal["fine", "advice", "problem"]
    text: str


@dataclass(frozen=True)
class Machine:
    """The hardware and programs of a computer."""

    gpu_names: tuple[str, ...]
    gpu_memory_bytes: int
    """Of the smallest GPU."""
    host_memory_bytes: int
    """Available: free or only cached."""
    cores: int
    tools: Mapping[str, str | None]
    """Program -> its path, None where it is missing."""


def inspect_machine(environment: Mapping[str, str]) -> Machine:
    """This computer, with the PATH of `environment`."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = [torch.cuda.get_device_properties(index) for index in range(count)]
    tools = {name: shutil.which(name, path=environment.get("PATH")) for name in ("g++", "c++", "ninja", "nvidia-smi", "sbatch")}
    return Machine(
        tuple(gpu.name for gpu in gpus),
        min((gpu.total_memory for gpu in gpus), default=0),
        _free_memory(),
        runtime.cores(),
        tools,
    )


def examine(config: RunConfig | None, machine: Machine, environment: Mapping[str, str]) -> list[Finding]:
    """All findings. Nothing is changed and no process group is started.

    Args:
        config: None = check only what does not depend on one.
        environment: variables, of which CUDA_VISIBLE_DEVICES is read.
    """
    findings = [*_versions(), *_accelerators(machine, environment), *_network(), *_compilers(config, machine)]
    if config:
        findings += [*_disk(config), *_data(config), *_layout(config, machine), *_extras(config, environment)]
    else:
        findings.append(Finding("advice", "give a configuration (tiglon doctor CONFIG) to check its data, memory and disk"))
    return findings


def _versions() -> Iterator[Finding]:
    yield Finding("fine", f"Python {platform.python_version()} on {platform.platform(terse=True)}")
    release = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if not TORCH[0] <= release < TORCH[1]:
        yield Finding(
            "problem", f"torch is {torch.__version__}; tiglon is tested with 2.11 to 2.13: pip install 'torch>=2.11,<2.14'"
        )
    else:
        yield Finding("fine", f"torch {torch.__version__}")
    for name, wanted in PINNED.items():
        try:
            got = version(name)
        except PackageNotFoundError:
            yield Finding("problem", f"{name} is not installed; pip install {name}=={wanted}")
            continue
        if got == wanted:
            yield Finding("fine", f"{name} {got}")
        else:
            yield Finding("problem", f"{name} is {got}, but tiglon uses internals of {wanted}: pip install {name}=={wanted}")


def _accelerators(machine: Machine, environment: Mapping[str, str]) -> Iterator[Finding]:
    if machine.gpu_names:
        counts = {name: machine.gpu_names.count(name) for name in machine.gpu_names}
        gpus = ", ".join(f"{count} x {name}" for name, count in counts.items())
        libraries = f"nccl {_present(dist.is_nccl_available())}, cuDNN {torch.backends.cudnn.version() or 'is missing'}"
        yield Finding("fine", f"{gpus}, {machine.gpu_memory_bytes / 1e9:.0f} GB each; {libraries}")
        if len(counts) > 1:
            yield Finding(
                "advice", "the GPUs differ: every step waits for the slowest; choose equal ones with CUDA_VISIBLE_DEVICES"
            )
        if not dist.is_nccl_available():
            yield Finding("problem", "this build of torch has no nccl, which GPUs communicate by; install a CUDA build")
        return
    if environment.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        yield Finding("advice", "CUDA_VISIBLE_DEVICES hides every GPU; unset it to train on them")
    elif machine.tools.get("nvidia-smi") and torch.version.cuda is None:
        yield Finding(
            "problem", f"there is an NVIDIA driver, but torch {torch.__version__} is a CPU build; install a CUDA build"
        )
    elif machine.tools.get("nvidia-smi"):
        yield Finding("problem", "there is an NVIDIA driver, but torch finds no GPU; nvidia-smi shows whether the driver works")
    yield Finding(
        "fine", f"no GPU; {machine.cores} cores and {machine.host_memory_bytes / 1e9:.1f} GB of free memory for CPU ranks"
    )


def _network() -> Iterator[Finding]:
    if not dist.is_gloo_available():
        yield Finding(
            "problem", "this build of torch has no gloo, which CPU ranks and checkpoints need; install an official build"
        )
        return
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        yield Finding(
            "problem",
            f"this computer's name {name} has no address, so gloo cannot bind: add it to /etc/hosts or set GLOO_SOCKET_IFNAME",
        )
        return
    yield Finding("fine", f"gloo is there; {name} is {address}")
    if address.startswith("127."):
        yield Finding(
            "advice", f"{name} is a loopback address: for several nodes set GLOO_SOCKET_IFNAME to the device that joins them"
        )


def _compilers(config: RunConfig | None, machine: Machine) -> Iterator[Finding]:
    compiler = machine.tools.get("g++") or machine.tools.get("c++")
    name = "optimizer.compile" if config is not None and config.optimizer.compile else "train.compile"
    wanted = config is not None and (config.train.compile or config.optimizer.compile)
    if compiler:
        yield Finding("fine", f"C++ compiler {compiler}")
    elif wanted and not machine.gpu_names:
        yield Finding("problem", f"{name} = true needs a C++ compiler on CPU and there is none; install g++ or switch it off")
    else:
        yield Finding("advice", "no C++ compiler: everything runs but train.compile and optimizer.compile on CPU")


def _disk(config: RunConfig) -> Iterator[Finding]:
    for directory in {config.run.dir, config.checkpoint.directory or config.run.dir}:
        if "://" not in directory and (fault := _unwritable(Path(directory).absolute())):
            yield Finding("problem", f"{fault}, so {directory} cannot be written: choose another or get write permission")
            return
    target = config.checkpoint.directory or config.run.dir
    if "://" in target:
        yield Finding("fine", f"checkpoints go to {target}; whether it can be written is not checked here")
        return
    path = _existing(Path(target).absolute())
    free = shutil.disk_usage(path).free
    size, count = checkpoint_bytes(config), config.checkpoint.keep + 1
    sentence = f"{format_bytes(free)} free in {path}; {plural(count, 'checkpoint')} of {format_bytes(size)} at once"
    if free < count * size:
        yield Finding("problem", f"{sentence}: free some space or lower checkpoint.keep")
    else:
        yield Finding("fine", sentence)


def _existing(path: Path) -> Path:
    """The path, or its nearest parent that exists."""
    while not path.exists():
        path = path.parent
    return path


def _unwritable(path: Path) -> str:
    """Why nothing can be written below a path, "" if something can: tried with a file without a name."""
    path = _existing(path)
    if not path.is_dir():
        return f"{path} is not a directory"
    try:
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        return f"no file can be created in {path} ({error.strerror})"
    return ""


def _data(config: RunConfig) -> Iterator[Finding]:
    sources = config.data.sources("train")
    if not sources:
        yield Finding("problem", "data.train is empty; prepare a corpus with tiglon prepare and name it there")
    for source in [*sources, *config.data.sources("validation")]:
        try:
            manifest = read_corpus_manifest(source.path)
        except (FileNotFoundError, ValueError) as error:
            yield Finding("problem", str(error))
            continue
        tokens = sum(shard.tokens for shard in manifest.shards)
        yield Finding("fine", f"{source.path}: {tokens:,} tokens in {plural(len(manifest.shards), 'shard')}")
        if manifest.vocab_size > config.model.vocab_size:
            yield Finding(
                "problem",
                f"{source.path} has {manifest.vocab_size} token ids, model.vocab_size = {config.model.vocab_size}; raise it",
            )


def _layout(config: RunConfig, machine: Machine) -> Iterator[Finding]:
    parallel = config.parallel
    least = parallel.tensor_parallel_size * parallel.context_parallel_size * parallel.pipeline_parallel_size
    ranks = len(machine.gpu_names) or least
    try:
        micro_batches(config, ranks)
        layout = layout_of(config, ranks)
    except ValueError as error:
        yield Finding("advice", f"on the {plural(ranks, 'rank')} of this computer: {error}")
        return
    needed = memory(config, layout, "cuda" if machine.gpu_names else "cpu").peak
    available = machine.gpu_memory_bytes or machine.host_memory_bytes // ranks
    needs = f"{plural(ranks, 'rank')} here need{'s' * (ranks == 1)} about {format_bytes(needed)}{' each' * (ranks > 1)}"
    sentence = f"{needs}, {format_bytes(available)} are available"
    if needed > available:
        yield Finding("problem", f"{sentence}: see tiglon plan for a smaller layout")
    else:
        yield Finding("fine", sentence)


def _extras(config: RunConfig, environment: Mapping[str, str]) -> Iterator[Finding]:
    name = config.log.tracker
    if name != NO_TRACKER and importlib.util.find_spec(name) is None:
        yield Finding("problem", f"log.tracker = '{name}', but {name} is not installed: pip install 'tiglon[{name}]'")
    elif name != NO_TRACKER and (missing := TRACKERS[name].missing(environment)):
        yield Finding("problem", f"log.tracker = '{name}': {missing}")


def _free_memory() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0)


def _present(value: bool) -> str:
    return "is there" if value else "is missing"


def doctor_command(
    config_path: Annotated[Path | None, typer.Argument(metavar="[CONFIG]", help="TOML file, or a shipped one's name.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[section.key=value]...", help="Changes to it.")] = None,
) -> None:
    """Check this environment for a configuration; exit status 1 if something will stop the run.

    Example: tiglon doctor quickstart
    """
    environment = runtime.environment()
    begun = load_begun(config_path, overrides) if config_path else None
    config = ahead(begun.config, begun.state) if begun else None
    findings = examine(config, inspect_machine(environment), environment)
    marks = {"fine": "ok      ", "advice": "advice  ", "problem": "PROBLEM "}
    for finding in findings:
        typer.echo(marks[finding.kind] + finding.text)
    problems = sum(finding.kind == "problem" for finding in findings)
    typer.echo(plural(problems, "problem") if problems else "no problem found")
    raise typer.Exit(1 if problems else 0)
