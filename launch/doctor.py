"""`tiglon doctor`: what is wrong with this environment for this configuration, in sentences."""

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

from data.shards import read_manifest
from launch import runtime
from launch.config import RunConfig, load, micro_batches
from launch.memory import Layout, layout_of, memory
from trainer.progress import plural, size

PINNED = {"deepspeed": "0.19.8", "megatron-core": "0.16.1"}
TORCH = ((2, 11), (2, 14))
"""The range of torch that was run: from, and below."""


@dataclass(frozen=True)
class Finding:
    """One sentence. A problem will stop the run, advice will not."""

    kind: Literal["fine", "advice", "problem"]
    text: str


@dataclass(frozen=True)
class Machine:
    """What the doctor looked at; a test hands in another one."""

    gpu_names: tuple[str, ...]
    gpu_memory_bytes: int
    """Of the smallest GPU."""
    host_memory_bytes: int
    """Free, without what is only cached."""
    cores: int
    tools: Mapping[str, str | None]
    """Path of each program, None where it is missing."""


def look(environment: Mapping[str, str]) -> Machine:
    """This computer."""
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
    """Everything the doctor has to say, problems included; nothing is changed and no process group is started."""
    found = [*_versions(), *_accelerators(machine, environment), *_network(), *_compilers(config, machine)]
    if config:
        found += [*_disk(config), *_data(config), *_layout(config, machine), *_extras(config)]
    else:
        found.append(
            Finding("advice", "give a configuration (tiglon doctor CONFIG) to have its data, memory and disk examined")
        )
    return found


def _versions() -> Iterator[Finding]:
    yield Finding("fine", f"Python {platform.python_version()} on {platform.platform(terse=True)}")
    found = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if not TORCH[0] <= found < TORCH[1]:
        yield Finding(
            "problem", f"torch is {torch.__version__}; tiglon was run with 2.11 to 2.13: pip install 'torch>=2.11,<2.14'"
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
            yield Finding(
                "problem", f"{name} is {got}, but tiglon reads the internals of {wanted}: pip install {name}=={wanted}"
            )


def _accelerators(machine: Machine, environment: Mapping[str, str]) -> Iterator[Finding]:
    if machine.gpu_names:
        names = {name: machine.gpu_names.count(name) for name in machine.gpu_names}
        listed = ", ".join(f"{count} x {name}" for name, count in names.items())
        libraries = f"nccl {_yes(dist.is_nccl_available())}, cuDNN {torch.backends.cudnn.version() or 'is missing'}"
        yield Finding("fine", f"{listed}, {machine.gpu_memory_bytes / 1e9:.0f} GB each; {libraries}")
        if len(names) > 1:
            yield Finding(
                "advice", "the GPUs differ: every step waits for the slowest; choose alike ones with CUDA_VISIBLE_DEVICES"
            )
        if not dist.is_nccl_available():
            yield Finding("problem", "this build of torch has no nccl, so GPUs cannot talk; install a CUDA build of torch")
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
        yield Finding("problem", f"{name} = true needs a C++ compiler on CPU and there is none; install g++ or leave it off")
    else:
        yield Finding("advice", "no C++ compiler: everything runs but train.compile and optimizer.compile on CPU")


def _disk(config: RunConfig) -> Iterator[Finding]:
    for place in {config.run.dir, config.checkpoint.directory or config.run.dir}:
        if "://" not in place and (fault := _unwritable(Path(place).absolute())):
            yield Finding("problem", f"{fault}, so {place} cannot be written: choose another place or ask for the right to it")
            return
    target = config.checkpoint.directory or config.run.dir
    if "://" in target:
        yield Finding("fine", f"checkpoints go to {target}; whether it can be written is not examined here")
        return
    place = Path(target).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    alone = Layout(1, 1, False, config.parallel.engine, 1, "none", 1, 1, "none")
    held = memory(config, alone)
    each = (held.masters or held.weights) + held.states
    count = config.checkpoint.keep + 1
    sentence = f"{size(free)} free in {place}; {count} checkpoints of {size(each)} are there at once"
    if free < count * each:
        yield Finding("problem", f"{sentence}: make room or lower checkpoint.keep")
    else:
        yield Finding("fine", sentence)


def _unwritable(path: Path) -> str:
    """Why nothing can be written below a path, or nothing; a directory is tried by making a file, which leaves no trace."""
    while not path.exists():
        path = path.parent
    if not path.is_dir():
        return f"{path} is not a directory"
    try:
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        return f"{path} takes no file ({error.strerror})"
    return ""


def _data(config: RunConfig) -> Iterator[Finding]:
    sources = config.data.sources("train")
    if not sources:
        yield Finding("problem", "data.train is empty; prepare a corpus with tiglon prepare and name it there")
    for source in [*sources, *config.data.sources("validation")]:
        try:
            manifest = read_manifest(source.path)
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
    ranks = len(machine.gpu_names) or config.parallel.tensor_parallel_size
    try:
        micro_batches(config, ranks)
        layout = layout_of(config, ranks)
    except ValueError as error:
        yield Finding("advice", f"on the {plural(ranks, 'rank')} of this computer: {error}")
        return
    need = memory(config, layout, "cuda" if machine.gpu_names else "cpu").peak
    room = machine.gpu_memory_bytes or machine.host_memory_bytes // ranks
    sentence = f"{plural(ranks, 'rank')} here need{'s' * (ranks == 1)} about {size(need)} each, {size(room)} are there"
    if need > room:
        yield Finding("problem", f"{sentence}: see tiglon plan for a smaller layout")
    else:
        yield Finding("fine", sentence)


def _extras(config: RunConfig) -> Iterator[Finding]:
    if config.log.wandb and importlib.util.find_spec("wandb") is None:
        yield Finding("problem", f"log.wandb = '{config.log.wandb}', but wandb is not installed: pip install 'tiglon[wandb]'")


def _free_memory() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0)


def _yes(value: bool) -> str:
    return "is there" if value else "is missing"


def doctor_command(
    config_path: Annotated[Path | None, typer.Argument(metavar="[CONFIG]", help="TOML configuration to examine for.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[section.key=value]...", help="Changes to it.")] = None,
) -> None:
    """Say what is wrong with this environment for a configuration; exit status 1 if something will stop the run.

    Example: tiglon doctor launch/configs/quickstart.toml
    """
    environment = runtime.environment()
    config = load(config_path, overrides or []) if config_path else None
    findings = examine(config, look(environment), environment)
    marks = {"fine": "ok      ", "advice": "advice  ", "problem": "PROBLEM "}
    for finding in findings:
        typer.echo(marks[finding.kind] + finding.text)
    problems = sum(finding.kind == "problem" for finding in findings)
    typer.echo(plural(problems, "problem") if problems else "nothing stands in the way")
    raise typer.Exit(1 if problems else 0)
