"""A real SLURM (slurm_setup.sh) takes the generated script, runs it on two nodes, requeues it, and the run resumes.

sudo tests/launch/commands/slurm_setup.sh install
sudo pytest -m slurm tests/launch/commands/test_slurm_real.py
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent.parent
SETUP = Path(__file__).parent / "slurm_setup.sh"
pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of someone who may submit to the two nodes."""
    if os.geteuid() or shutil.which("slurmctld") is None:
        pytest.skip(f"needs root and SLURM: run `{SETUP} install` as root")
    directory = tmp_path_factory.mktemp("slurm")
    started = subprocess.run([SETUP, "start", directory], capture_output=True, text=True, check=False)
    try:
        assert started.returncode == 0, started.stderr
        yield {**os.environ, "SLURM_CONF": f"{directory}/slurm.conf", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    finally:
        subprocess.run([SETUP, "stop", directory], capture_output=True, check=False)


def call(environment: dict[str, str], *command: str) -> str:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
    return done.stdout


def job(environment: dict[str, str], number: str) -> dict[str, str]:
    """What scontrol says of a job."""
    words = call(environment, "scontrol", "show", "job", number, "--oneliner").split()
    return dict(word.split("=", 1) for word in words if "=" in word)


def wait(what: str, done, timeout_seconds: float = 400) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not done():
        assert time.monotonic() < deadline, f"waited {timeout_seconds:.0f} s for {what}"
        time.sleep(0.2)


def losses(directory: Path) -> dict[int, float]:
    records = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["loss"] for record in records if record["kind"] == "train"}


def alone(environment: dict[str, str], configuration: str, directory: Path, *options: str) -> None:
    # on one core, as the nodes are: ranks take their share of the cores, and threads decide the order of sums
    core = str(min(os.sched_getaffinity(0)))
    torchrun = (
        "taskset",
        "--cpu-list",
        core,
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
    )
    call(environment, *torchrun, "-m", "launch.train", configuration, *options, f"run.dir={directory}")


def steps_of_half_a_minute(directory: Path) -> int:
    """So many that there is time to act, however fast this computer is."""
    records = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    seconds = statistics.median(record["step_seconds"] for record in records if record["kind"] == "train")
    return min(2000, max(40, round(30 / seconds / 20) * 20))


def requeue(environment: dict[str, str], number: str, restarts: int, command: tuple[str, ...]) -> None:
    """Send a running job back into the queue, and cut the two minutes of rest that SLURM gives it (its nodes refuse what
    comes back within the second)."""
    assert job(environment, number)["NodeList"] == "tiglon[1-2]"
    call(environment, *command)
    wait("the requeue", lambda: int(job(environment, number)["Restarts"]) == restarts)
    wait("its end", lambda: job(environment, number)["JobState"] in ("PENDING", "RUNNING"))
    if job(environment, number)["JobState"] == "PENDING":
        call(environment, "scontrol", "update", f"JobId={number}", "StartTime=now+5seconds")


def test_the_script_runs_on_two_nodes_is_requeued_twice_and_resumes(cluster, configuration: str, tmp_path: Path):
    """First by the notice before the time limit (USR1 to the script), then by `scontrol requeue`."""
    alone(cluster, configuration, tmp_path / "alone", "train.steps=10")
    steps = steps_of_half_a_minute(tmp_path / "alone")
    options = (f"train.steps={steps}", f"checkpoint.every_steps={steps // 20}", "checkpoint.keep=100")
    alone(cluster, configuration, tmp_path / "alone", *options)
    script = tmp_path / "job.sbatch"
    call(
        cluster, sys.executable, "-m", "launch", "slurm", configuration, *options, "--nodes=2", "--gpus-per-node=0",
        "--ranks-per-node=1", "--time=30", f"--output={script}",
    )  # fmt: skip
    number = call(cluster, "sbatch", "--parsable", str(script)).strip()
    log = tmp_path / f"run/logs/slurm-{number}.log"
    ways = (("scancel", "--batch", "--signal=USR1", number), ("scontrol", "requeue", number))
    for restarts, way in enumerate(ways, start=1):
        checkpoint = tmp_path / f"run/checkpoints/step-{restarts * 2 * steps // 5:08d}"
        wait(f"{checkpoint}: {log}", checkpoint.exists)
        requeue(cluster, number, restarts, way)
    wait("the end of the run", lambda: job(cluster, number)["JobState"] == "COMPLETED")
    text = log.read_text()
    assert text.count("resumed from") == 2, text
    assert "the time limit is near: every rank saves, then the job is requeued" in text
    assert "stopped by SIGUSR1" in text
    assert losses(tmp_path / "run") == losses(tmp_path / "alone")
    assert len(losses(tmp_path / "run")) == steps
