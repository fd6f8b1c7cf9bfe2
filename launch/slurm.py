"""`tiglon slurm`: the sbatch script a person would have written, checked before it waits in a queue."""

import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from data.storage import write_whole
from launch import program, runtime
from launch.config import RunConfig, load, micro_batches
from launch.runtime import TORCHRUN_SIGNALS, make_directory, torchrun_patience
from launch.status import STOPPED_FILE, Status

ROOT = Path(__file__).parent.parent
"""Folder of our packages."""


@dataclass(frozen=True)
class Job:
    """What is asked of SLURM."""

    nodes: int
    gpus_per_node: int
    """0 = a run on CPUs."""
    ranks_per_node: int
    time: str
    """Limit in one of SLURM's forms, see `seconds`."""
    cpus_per_task: int = 0
    """Of the one task a node, shared by its ranks; 0 = what the site gives."""
    partition: str = ""
    account: str = ""
    before: tuple[str, ...] = ()
    """Shell lines to run first on the first node, for example "module load cuda"."""
    max_restarts: int = 3
    python: str = "python"
    packages: str = ""
    """Folder of our packages where that Python does not find them by itself; "" where it does."""


def script(config: RunConfig, config_path: str, overrides: list[str], job: Job) -> str:
    """The text of the script.

    One task a node runs torchrun, which starts the ranks; the nodes find one another through c10d on the first. Before the time
    limit SLURM signals the script, which lets every rank save and puts the job back into the queue; after a preemption
    SLURM does so itself. Either way the next start resumes from the newest checkpoint. The script's exit status is 0 when
    all steps are done, STOPPED when a signal ended the run after every rank had saved, else that of srun.

    Raises:
        ValueError: a layout, a time or a setting that could not run, before it waits in a queue.
    """
    _check(config, job)
    run = shlex.quote(f"{config.run.dir}/logs")
    options = [
        f"--job-name={re.sub(r'[^A-Za-z0-9._-]', '-', Path(config.run.dir).name) or 'tiglon'}",
        f"--nodes={job.nodes}",
        "--ntasks-per-node=1                # one torchrun a node; it starts the ranks",
        *([f"--gpus-per-node={job.gpus_per_node}"] if job.gpus_per_node else []),
        *([f"--cpus-per-task={job.cpus_per_task}"] if job.cpus_per_task else []),
        *([f"--partition={quoted(job.partition)}"] if job.partition else []),
        *([f"--account={quoted(job.account)}"] if job.account else []),
        f"--time={job.time}",
        f"--signal=B:USR1@{_notice(config)}              # seconds before the limit: save, then back into the queue",
        "--requeue                          # after a preemption or a dead node as well",
        "--open-mode=append",
        f"--output={quoted(config.run.dir.replace('%', '%%') + '/logs/slurm-%j.log')}",
    ]
    program = " ".join(shlex.quote(word) for word in ("launch.train", config_path, *overrides))
    torchrun = [
        f"{shlex.quote(job.python)} -m torch.distributed.run",
        f"--nnodes={job.nodes} --nproc-per-node={job.ranks_per_node} --max-restarts={job.max_restarts}",
        f"--signals-to-handle={TORCHRUN_SIGNALS}",
        '--rdzv-backend=c10d --rdzv-endpoint="$first:$port"',
        '--rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"',
        f"-m {program}",
    ]
    packages = f"export PYTHONPATH={shlex.quote(job.packages)}${{PYTHONPATH:+:$PYTHONPATH}}\n" if job.packages else ""
    return _TEMPLATE.format(
        options="\n".join(f"#SBATCH {option}" for option in options),
        logs=run,
        stopped=shlex.quote(f"{config.run.dir}/{STOPPED_FILE}"),
        stopped_status=Status.STOPPED.value,
        packages=packages,
        before="".join(f"{line}\n" for line in job.before),
        threads=f"$(( (${{SLURM_CPUS_PER_TASK:-{job.ranks_per_node}}} + {job.ranks_per_node - 1}) / {job.ranks_per_node} ))",
        grace=torchrun_patience(config.health.grace_seconds),
        torchrun=" \\\n    ".join(torchrun),
    )


_TEMPLATE = """\
#!/bin/bash
{options}

mkdir -p {logs}
{before}export OMP_NUM_THREADS={threads}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={grace} # seconds that torchrun leaves its ranks for saving
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # else a node that comes back waits for an address told only once
export PYTHONSAFEPATH=1 # a data.py or model.py in this directory is not imported in place of our packages
{packages}stopped={stopped} # the ranks leave this file when a signal ended them and all is saved
rm -f "$stopped"

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))

srun --kill-on-bad-exit=0 --wait=60 {torchrun} &
step=$!

leave() {{ # {stopped_status}: saved, submit again to go on; else 0 done, or failed as srun says
    [ -e "$stopped" ] && exit {stopped_status}
    exit "$1"
}}
back_into_the_queue() {{
    trap '' USR1
    echo "time is nearly up: every rank saves, then the job queues again"
    kill -USR1 "$step" && running=yes # srun hands it to torchrun, torchrun to the ranks
    wait "$step"
    status=$?
    # a run that has just done its last step, or has failed by itself, is not begun again
    if [ -e "$stopped" ] || [ "$status" != 0 -a "$running" ]; then
        scontrol requeue "$SLURM_JOB_ID" && sleep 600 # until SLURM ends this script: an end of its own would be the job's
    fi
    leave "$status"
}}
trap back_into_the_queue USR1

wait "$step"
leave $?
"""


USEFUL_SECONDS = 120
"""Least time of a job before the notice: SLURM speaks up to a minute early, and a start takes some of the rest."""


def quoted(value: str) -> str:
    """A value as sbatch reads it in a #SBATCH line: a space ends it and a # begins a comment unless it stands in quotes."""
    if re.fullmatch(r"[\w./%@:+,=-]*", value):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def seconds(time: str) -> int | None:
    """A time limit of SLURM's in seconds; None for no limit, which SLURM also calls 0.

    Its forms: minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes, days-hours:minutes:seconds.

    Raises:
        ValueError: none of these.
    """
    if time.upper() in ("INFINITE", "UNLIMITED"):
        return None
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time, re.ASCII)
    if not found:
        raise ValueError(f"--time {time} is not a time limit; write minutes, HH:MM:SS or D-HH:MM:SS")
    days, first, second, third = found.groups()
    hours, minutes, rest = (first, second, third) if days or third else (0, first, second)
    return ((int(days or 0) * 24 + int(hours)) * 60 + int(minutes or 0)) * 60 + int(rest or 0) or None


def _notice(config: RunConfig) -> int:
    """Seconds before the time limit at which SLURM speaks up: the grace period and time to start it (SLURM's clock is
    right to a minute)."""
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
    limit, least = seconds(job.time), _notice(config) + USEFUL_SECONDS
    if limit is not None and limit < least:
        raise ValueError(
            f"--time {job.time} is {limit} s, but {_notice(config)} s before the limit the run is told to save "
            f"(health.grace_seconds = {config.health.grace_seconds:g} and 90 s): "
            f"give at least {least} s, that is {-(-least // 60)} minutes"
        )
    for name, text in (("run.dir", config.run.dir), ("--partition", job.partition), ("--account", job.account)):
        if "\\" in text or not text.isprintable():
            raise ValueError(
                f"{name} = {text!r}: sbatch cannot be told a name with a backslash or a line break; choose another"
            )
    if config.checkpoint.resume == "never":
        raise ValueError("checkpoint.resume = 'never' would start a requeued job from the beginning; use resume = 'auto'")
    if config.run.device == "cuda" and not job.gpus_per_node:
        raise ValueError("run.device = 'cuda' needs GPUs, but --gpus-per-node is 0; give their number or use run.device=cpu")
    size = config.parallel.tensor_parallel_size
    if job.ranks_per_node % size:
        raise ValueError(
            f"parallel.tensor_parallel_size = {size} would cross nodes of {job.ranks_per_node} ranks, where its sums are slow; "
            "use a size that divides the ranks of a node"
        )
    micro_batches(config, job.nodes * job.ranks_per_node)


def _is_installed(python: str) -> bool:
    """Whether a Python finds these very packages without PYTHONPATH and without looking into the working directory."""
    environment = {key: value for key, value in runtime.environment().items() if key != "PYTHONPATH"}
    ask = [python, "-P", "-c", "import importlib.util as i; print(getattr(i.find_spec('launch'), 'origin', ''))"]
    found = subprocess.run(ask, env=environment, capture_output=True, text=True, check=False).stdout.strip()
    return bool(found) and Path(found).resolve() == (ROOT / "launch" / "__init__.py").resolve()


def slurm_command(
    config_path: Annotated[Path, typer.Argument(metavar="CONFIG", help="TOML configuration of the run.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[section.key=value]...", help="Changes to it.")] = None,
    nodes: Annotated[int, typer.Option("--nodes", help="Nodes.")] = 1,
    gpus_per_node: Annotated[int, typer.Option("--gpus-per-node", help="GPUs of a node; 0 = CPUs.")] = 8,
    ranks_per_node: Annotated[int | None, typer.Option("--ranks-per-node", help="Default: one a GPU.")] = None,
    time: Annotated[str, typer.Option("--time", help="Limit, D-HH:MM:SS.")] = "24:00:00",
    cpus_per_task: Annotated[int, typer.Option("--cpus-per-task", help="Cores of a node; 0 = default.")] = 0,
    partition: Annotated[str, typer.Option("--partition", help="SLURM partition.")] = "",
    account: Annotated[str, typer.Option("--account", help="SLURM account.")] = "",
    before: Annotated[list[str] | None, typer.Option("--before", help="Shell line to run first.")] = None,
    max_restarts: Annotated[int, typer.Option("--max-restarts", help="After a failed rank.")] = 3,
    output: Annotated[Path | None, typer.Option("--output", help="Default: CONFIG.sbatch.")] = None,
) -> None:
    """Write the sbatch script of a run: srun, one torchrun a node, save and requeue before the time limit.

    Example: tiglon slurm launch/configs/quickstart.toml --nodes 4 --gpus-per-node 8 --time 2-00:00:00
    """
    config = load(config_path, overrides or [])
    packages = "" if _is_installed(sys.executable) else str(ROOT)
    ranks = ranks_per_node if ranks_per_node is not None else max(1, gpus_per_node)
    job = Job(
        nodes, gpus_per_node, ranks, time, cpus_per_task, partition, account, tuple(before or ()), max_restarts,
        sys.executable, packages,
    )  # fmt: skip
    text = script(config, str(config_path), overrides or [], job)
    target = output or Path(f"{config_path.stem}.sbatch")
    make_directory(Path(config.run.dir) / "logs")  # sbatch opens its log there before the script runs
    try:
        write_whole(str(target), text.encode())
    except program.USERS as error:
        assert isinstance(error, OSError)
        raise ValueError(
            f"--output {target} cannot be written ({error.strerror}); name a file in a place that can be"
        ) from None
    typer.echo(f"wrote {target}; submit it with: sbatch {target}")
