"""`tiglon slurm`: write an sbatch script, checked before it waits in a queue."""

import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from data.storage import write_atomic
from launch import program, runtime
from launch.batches import ahead, micro_batches
from launch.commands.configured import load_begun
from launch.config import RunConfig
from launch.exit_status import STOPPED_FILE, Status
from launch.runtime import TORCHRUN_SIGNALS, make_directory, torchrun_patience
from trainer.monitoring.progress import plural

ROOT = Path(__file__).parent.parent.parent
"""Folder that holds the packages launch, trainer, model and data."""


@dataclass(frozen=True)
class Job:
    """What to request from SLURM."""

    nodes: int
    gpus_per_node: int
    """0 = a run on CPUs."""
    ranks_per_node: int
    time: str
    """Time limit in one of SLURM's forms, see `time_limit_seconds`."""
    cpus_per_task: int = 0
    """Cores of the one task per node, shared by its ranks; 0 = the site's default."""
    mem: str = ""
    """Memory per node in one of SLURM's forms; "0" = all of it; "" = the site's default, which may be little, or all of it
    where the job has the nodes for itself."""
    exclusive: bool = False
    """Share the nodes with no other job."""
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    """Features of the nodes, in SLURM's form, for example "h100&nvlink"."""
    options: tuple[str, ...] = ()
    """Further options of sbatch, --name or --name=value."""
    before: tuple[str, ...] = ()
    """Shell lines to run first, on the first node, for example "module load cuda"."""
    max_restarts: int = 3
    python: str = "python"
    packages: str = ""
    """Folder to put on PYTHONPATH where `python` does not find the packages of ROOT by itself; "" where it does."""


def sbatch_script(config: RunConfig, config_path: str, overrides: list[str], job: Job) -> str:
    """The text of the script.

    One task per node runs torchrun, which starts the ranks; the nodes rendezvous through c10d on the first. Before the time
    limit SLURM signals the script, which lets every rank save and requeues the job; after a preemption SLURM requeues it
    itself. Either way the next start resumes from the newest checkpoint. The script's exit status is 0 when all steps are
    done, STOPPED when a signal ended the run after every rank had saved, else that of srun.

    Raises:
        ValueError: a layout, a time or a setting that could not run.
    """
    _check(config, job)
    packages = f"export PYTHONPATH={shlex.quote(job.packages)}${{PYTHONPATH:+:$PYTHONPATH}}\n" if job.packages else ""
    return _TEMPLATE.format(
        options="\n".join(f"#SBATCH {option}" for option in _sbatch_options(config, job)),
        logs=shlex.quote(f"{config.run.dir}/logs"),
        stopped=shlex.quote(f"{config.run.dir}/{STOPPED_FILE}"),
        stopped_status=Status.STOPPED.value,
        packages=packages,
        before="".join(f"{line}\n" for line in job.before),
        ranks=job.ranks_per_node,
        grace=torchrun_patience(config.health.grace_seconds),
        torchrun=" \\\n    ".join(_torchrun_words(config_path, overrides, job)),
    )


def _sbatch_options(config: RunConfig, job: Job) -> list[str]:
    """What follows #SBATCH, a line each."""
    return [
        f"--job-name={re.sub(r'[^A-Za-z0-9._-]', '-', Path(config.run.dir).name) or 'tiglon'}",
        f"--nodes={job.nodes}",
        "--ntasks-per-node=1                # one torchrun per node; it starts the ranks",
        *([f"--gpus-per-node={job.gpus_per_node}"] if job.gpus_per_node else []),
        *([f"--cpus-per-task={job.cpus_per_task}"] if job.cpus_per_task else []),
        *([f"--mem={job.mem or 0}"] if job.mem or job.exclusive else []),
        *(["--exclusive"] if job.exclusive else []),
        *(f"--{name}={sbatch_quote(value)}" for name, value in _names(job).items() if value),
        f"--time={job.time}",
        f"--signal=B:USR1@{_notice(config)}              # seconds before the limit: save, then requeue",
        "--requeue                          # after a preemption or a dead node as well",
        "--open-mode=append",
        f"--output={sbatch_quote(config.run.dir.replace('%', '%%') + '/logs/slurm-%j.log')}",
        *map(sbatch_quote, job.options),
    ]


def _names(job: Job) -> dict[str, str]:
    """Options whose value is a name that the site knows."""
    return {"partition": job.partition, "account": job.account, "qos": job.qos, "constraint": job.constraint}


def _torchrun_words(config_path: str, overrides: list[str], job: Job) -> list[str]:
    """The command that srun runs on each node, a part for each line."""
    return [
        f"{shlex.quote(job.python)} -m torch.distributed.run",
        f"--nnodes={job.nodes} --nproc-per-node={job.ranks_per_node} --max-restarts={job.max_restarts}",
        f"--signals-to-handle={TORCHRUN_SIGNALS}",
        '--rdzv-backend=c10d --rdzv-endpoint="$first:$port"',
        '--rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"',
        "-m " + shlex.join(["launch.train", config_path, *overrides]),
    ]


_TEMPLATE = """\
#!/bin/bash
{options}

mkdir -p {logs}
{before}cpus=${{SLURM_CPUS_PER_TASK:-${{SLURM_CPUS_ON_NODE:-1}}}} # of the one task on this node
[ -z "$SLURM_CPUS_PER_TASK" ] || export SRUN_CPUS_PER_TASK=$cpus # since SLURM 22.05 srun does not take it from the job
export OMP_NUM_THREADS=$((cpus > {ranks} ? cpus / {ranks} : 1))
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={grace} # seconds that torchrun gives its ranks to save
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # without it a node that rejoins waits for an address published only once
export PYTHONSAFEPATH=1 # a data.py or model.py in this directory does not shadow tiglon's packages
{packages}stopped={stopped} # the ranks write this file after a signal, once all is saved
rm -f "$stopped"

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))

srun --kill-on-bad-exit=0 --wait=60 {torchrun} &
step=$!

finish() {{ # {stopped_status}: stopped and saved, submit again to resume; else the status of srun: 0 = all steps are done
    [ -e "$stopped" ] && exit {stopped_status}
    exit "$1"
}}
save_and_requeue() {{
    trap '' USR1
    echo "the time limit is near: every rank saves, then the job is requeued"
    kill -USR1 "$step" && running=yes # srun forwards it to torchrun, torchrun to the ranks
    wait "$step"
    status=$?
    # a run that has just done its last step, or has failed by itself, is not requeued
    if [ -e "$stopped" ] || [ "$status" != 0 -a "$running" ]; then
        scontrol requeue "$SLURM_JOB_ID" && sleep 600 # until SLURM kills this script: if it ended by itself, so would the job
    fi
    finish "$status"
}}
trap save_and_requeue USR1

wait "$step"
finish $?
"""


OWN_OPTIONS = (
    "job-name", "nodes", "ntasks", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "mem", "exclusive", "partition",
    "account", "qos", "constraint", "time", "signal", "requeue", "no-requeue", "open-mode", "output", "error", "array", "wrap",
    "export",
)  # fmt: skip
"""Options of sbatch that the script decides, or that would make it another one."""

USEFUL_SECONDS = 120
"""Least time of a job before the notice: SLURM signals up to a minute early, and a start takes some of the rest."""


def sbatch_quote(value: str) -> str:
    """Quote a value for an #SBATCH line, where a space ends an unquoted value and a # begins a comment."""
    if re.fullmatch(r"[\w./%@:+,=-]*", value):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def time_limit_seconds(time: str) -> int | None:
    """A SLURM time limit in seconds; None for no limit (also 0).

    Forms: minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes, days-hours:minutes:seconds.

    Raises:
        ValueError: none of these forms.
    """
    if time.upper() in ("INFINITE", "UNLIMITED"):
        return None
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time, re.ASCII)
    if not match:
        raise ValueError(f"--time {time} is not a time limit; write minutes, HH:MM:SS or D-HH:MM:SS")
    days, first, second, third = match.groups()
    hours, minutes, rest = (first, second, third) if days or third else (0, first, second)
    return ((int(days or 0) * 24 + int(hours)) * 60 + int(minutes or 0)) * 60 + int(rest or 0) or None


def _notice(config: RunConfig) -> int:
    """Seconds before the time limit at which SLURM signals the script: the grace period, and 90 s because SLURM's clock
    is right to a minute."""
    return round(config.health.grace_seconds) + 90


def _check(config: RunConfig, job: Job) -> None:
    for name, value, least in (
        ("--nodes", job.nodes, 1),
        ("--ranks-per-node", job.ranks_per_node, 1),
        ("--gpus-per-node", job.gpus_per_node, 0),
        ("--cpus-per-task", job.cpus_per_task, 0),
        ("--max-restarts", job.max_restarts, 0),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    limit, least = time_limit_seconds(job.time), _notice(config) + USEFUL_SECONDS
    if limit is not None and limit < least:
        raise ValueError(
            f"--time {job.time} is {limit} s, but {_notice(config)} s before the limit the run is signalled to save "
            f"(health.grace_seconds = {config.health.grace_seconds:g} and 90 s): "
            f"give at least {least} s, that is {plural(-(-least // 60), 'minute')}"
        )
    if not re.fullmatch(r"(?:\d+[KMGT]?)?", job.mem, re.ASCII | re.IGNORECASE):
        raise ValueError(
            f"--mem {job.mem} is not a size of memory; write megabytes, or a number with K, M, G or T; 0 is all of a node"
        )
    names = {f"--{name}": value for name, value in _names(job).items()} | {"--option": "".join(job.options)}
    for name, text in {"run.dir": config.run.dir, **names}.items():
        if "\\" in text or not text.isprintable():
            raise ValueError(f"{name} = {text!r}: sbatch cannot read a name with a backslash or a line break; choose another")
    for option in job.options:
        _check_option(option)
    if config.checkpoint.resume == "never":
        raise ValueError("checkpoint.resume = 'never' would start a requeued job from the beginning; use resume = 'auto'")
    if config.run.device == "cuda" and not job.gpus_per_node:
        raise ValueError("run.device = 'cuda' needs GPUs, but --gpus-per-node is 0; give their number or use run.device=cpu")
    size = config.parallel.tensor_parallel_size
    if job.ranks_per_node % size:
        raise ValueError(
            f"parallel.tensor_parallel_size = {size} would cross nodes of {plural(job.ranks_per_node, 'rank')}, with slow "
            "all-reduces; use a size that divides the ranks of a node"
        )
    micro_batches(config, job.nodes * job.ranks_per_node)


def _check_option(option: str) -> None:
    match = re.fullmatch(r"--([a-z][a-z0-9-]+)(?:=.+)?", option)
    if not match:
        raise ValueError(
            f"--option {option!r} is not --NAME or --NAME=VALUE; write for example --option=--reservation=maintenance"
        )
    if own := next((own for own in OWN_OPTIONS if own.startswith(match[1])), None):  # sbatch takes abbreviations
        raise ValueError(
            f"--option {option}: --{own} is the script's own, which relies on it; see tiglon slurm --help for what may be set"
        )


def _is_installed(python: str) -> bool:
    """Whether a Python finds the packages of ROOT without PYTHONPATH and outside the working directory."""
    environment = {key: value for key, value in runtime.environment().items() if key != "PYTHONPATH"}
    command = [python, "-P", "-c", "import importlib.util as i; print(getattr(i.find_spec('launch'), 'origin', ''))"]
    origin = subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout.strip()
    return bool(origin) and Path(origin).resolve() == (ROOT / "launch" / "__init__.py").resolve()


def slurm_command(
    config_path: Annotated[Path, typer.Argument(metavar="CONFIG", help="TOML file, or a shipped one's name.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[section.key=value]...", help="Changes to it.")] = None,
    nodes: Annotated[int, typer.Option("--nodes", help="Number of nodes.")] = 1,
    gpus_per_node: Annotated[int, typer.Option("--gpus-per-node", help="GPUs per node; 0 = CPUs.")] = 8,
    ranks_per_node: Annotated[int | None, typer.Option("--ranks-per-node", help="Default: one per GPU.")] = None,
    time: Annotated[str, typer.Option("--time", help="Limit, D-HH:MM:SS.")] = "24:00:00",
    cpus_per_task: Annotated[int, typer.Option("--cpus-per-task", help="Cores per node.", show_default=False)] = 0,
    mem: Annotated[str, typer.Option("--mem", help="Memory per node, as 200G; 0 = all.")] = "",
    exclusive: Annotated[bool, typer.Option("--exclusive", help="Whole nodes, all their memory.")] = False,
    partition: Annotated[str, typer.Option("--partition", help="SLURM partition.")] = "",
    account: Annotated[str, typer.Option("--account", help="SLURM account.")] = "",
    qos: Annotated[str, typer.Option("--qos", help="Quality of service.")] = "",
    constraint: Annotated[str, typer.Option("--constraint", help="Features of the nodes.")] = "",
    option: Annotated[list[str] | None, typer.Option("--option", help="Another one of sbatch.")] = None,
    before: Annotated[list[str] | None, typer.Option("--before", help="Shell line to run first.")] = None,
    max_restarts: Annotated[int, typer.Option("--max-restarts", help="After a failed rank.")] = 3,
    output: Annotated[Path | None, typer.Option("--output", help="Default: CONFIG.sbatch.")] = None,
) -> None:
    """Write the sbatch script of a run: srun, one torchrun per node, save and requeue before the time limit.

    Example: tiglon slurm llama-8b --nodes 4 --gpus-per-node 8 --time 2-00:00:00
    """
    begun = load_begun(config_path, overrides)
    config = ahead(begun.config, begun.state)
    packages = "" if _is_installed(sys.executable) else str(ROOT)
    ranks = ranks_per_node if ranks_per_node is not None else max(1, gpus_per_node)
    job = Job(
        nodes, gpus_per_node, ranks, time, cpus_per_task, mem, exclusive, partition, account, qos, constraint,
        tuple(option or ()), tuple(before or ()), max_restarts, sys.executable, packages,
    )  # fmt: skip
    text = sbatch_script(config, str(config_path), overrides or [], job)
    target = output or Path(f"{config_path.stem}.sbatch")
    make_directory(Path(config.run.dir) / "logs")  # SLURM opens its log there before the script runs
    try:
        write_atomic(str(target), text.encode())
    except program.USERS as error:
        assert isinstance(error, OSError)
        raise ValueError(f"--output {target} cannot be written ({error.strerror}); name a file where you can write") from None
    typer.echo(f"wrote {target}; submit it with: sbatch {shlex.quote(str(target))}")
