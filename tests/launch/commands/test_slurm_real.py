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
from contextlib import suppress
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
    # on one core, as on the nodes, where a job gets no more than it asks for: threads decide the order of sums
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


def rank(number: str) -> Path:
    """/proc of the first rank of a job's step."""
    found: list[Path] = []

    def running() -> bool:
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has ended
                environment = process_environment(process)
                if environment.get("SLURM_JOB_ID") == number and environment.get("RANK") == "0":
                    found.append(process)
        return bool(found)

    wait("a rank", running, 120)
    return found[0]


def process_environment(process: Path) -> dict[str, str]:
    """What a process was started with."""
    words = (process / "environ").read_bytes().decode(errors="replace").split("\0")
    return dict(word.split("=", 1) for word in words if "=" in word)


def cpus(process: Path) -> int:
    """How many CPUs a process may run on."""
    return len(os.sched_getaffinity(int(process.name)))


@pytest.mark.parametrize(
    ("options", "asked", "step", "cores"),
    [
        (
            ["--exclusive", "--constraint=fast", "--cpus-per-task=2", "--option=--comment=a reason"],
            {"OverSubscribe": "NO", "Features": "fast", "NodeList": "tiglon2", "MinMemoryNode": "0", "Comment": "a"},
            "cpu=2,mem=1500M,node=1",
            2,
        ),
        (["--mem=300M"], {"OverSubscribe": "OK", "MinMemoryNode": "300M", "NumCPUs": "1"}, "cpu=1,mem=300M,node=1", 1),
        ([], {"OverSubscribe": "OK", "MinMemoryCPU": "100M", "NumCPUs": "1"}, "cpu=1,mem=100M,node=1", 1),
    ],
    ids=["a whole node", "some memory", "the site's default"],
)  # fmt: skip
def test_what_is_asked_for_reaches_the_step(
    cluster, configuration: str, tmp_path: Path, options: list[str], asked: dict[str, str], step: str, cores: int
):
    """The job has the nodes, the memory and the cores, and so has the step in which the ranks run, with as many threads."""
    script = tmp_path / "job.sbatch"
    call(
        cluster, sys.executable, "-m", "launch", "slurm", configuration, "train.steps=100000", "--nodes=1", "--gpus-per-node=0",
        "--ranks-per-node=1", "--time=30", *options, f"--output={script}",
    )  # fmt: skip
    number = call(cluster, "sbatch", "--parsable", str(script)).strip()
    try:
        ranks_process = rank(number)
        told = job(cluster, number)
        assert {key: told[key] for key in asked} == asked
        assert f" TRES={step} " in call(cluster, "scontrol", "show", "step", f"{number}.0", "--oneliner") + " "
        assert cpus(ranks_process) == cores
        assert process_environment(ranks_process)["OMP_NUM_THREADS"] == str(cores)
    finally:
        call(cluster, "scancel", number)
        wait(
            "its end", lambda: job(cluster, number)["JobState"] in ("CANCELLED", "COMPLETED") and not step_runs(cluster, number)
        )


def step_runs(environment: dict[str, str], number: str) -> bool:
    return number in call(environment, "squeue", "--noheader", "--format=%i")


def test_names_that_this_slurm_does_not_know_are_refused_by_it(cluster, configuration: str, tmp_path: Path):
    """As sbatch reads them: quality of service, which needs an accounting database, by what it says that it has read."""
    script = tmp_path / "job.sbatch"
    call(
        cluster, sys.executable, "-m", "launch", "slurm", configuration, "--gpus-per-node=0", "--qos=after hours",
        "--constraint=slow&fast", "--mem=2G", "--option=--reservation=maintenance", f"--output={script}",
    )  # fmt: skip
    read = subprocess.run(["sbatch", "-vv", str(script)], env=cluster, capture_output=True, text=True, timeout=60, check=False)
    words = {" ".join(line.split()) for line in read.stderr.splitlines()}
    for option in ("qos : after hours", "constraint : slow&fast", "mem : 2G", "reservation : maintenance"):
        assert f"sbatch: {option}" in words, read.stderr
    assert read.returncode and "Batch job submission failed" in read.stderr
