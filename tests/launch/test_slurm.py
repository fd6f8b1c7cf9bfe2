"""The sbatch script: what stands in it, what is refused before it queues, and that a shell can read it."""

import subprocess
from pathlib import Path

import pytest
from typer import Typer
from typer.testing import CliRunner

from launch.config import build
from launch.slurm import Job, script, slurm_command

JOB = Job(nodes=4, gpus_per_node=8, ranks_per_node=8, time="2-00:00:00")


def made(*overrides: str, **changes: object) -> str:
    values = {"run": {"dir": "runs/big one"}, "train": {"global_batch_size": 64, "micro_batch_size": 2}}
    return script(
        build(values, overrides), "big.toml", ["train.steps=5", "run.dir=runs/big one"], Job(**{**JOB.__dict__, **changes})
    )


def test_the_script_says_what_a_person_would_have_written():
    text = made(partition="fast", account="us", cpus_per_task=96, before=("module load cuda",))
    for line in (
        "#SBATCH --nodes=4", "#SBATCH --ntasks-per-node=1", "#SBATCH --gpus-per-node=8", "#SBATCH --cpus-per-task=96",
        "#SBATCH --partition=fast", "#SBATCH --account=us", "#SBATCH --time=2-00:00:00", "#SBATCH --signal=B:USR1@120",
        "#SBATCH --requeue", "#SBATCH --output=runs/big one/logs/slurm-%j.log", "module load cuda",
    ):  # fmt: skip
        assert line in text
    assert "--nnodes=4 --nproc-per-node=8 --max-restarts=3" in text
    assert "-m launch.train big.toml train.steps=5 'run.dir=runs/big one'" in text
    assert len(text.splitlines()) < 50


def test_bash_can_read_it():
    assert subprocess.run(["bash", "-n"], input=made(), text=True, capture_output=True, check=False).stderr == ""


def test_cpu_jobs_ask_for_no_gpus():
    text = made("run.device=cpu", gpus_per_node=0, ranks_per_node=2)
    assert "--gpus" not in text
    assert "--nproc-per-node=2" in text


def test_notice_follows_the_grace_period():
    text = made("health.grace_seconds=120")
    assert "--signal=B:USR1@210" in text
    assert "export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=120" in text
    assert "export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=1 " in made("health.grace_seconds=0.2"), "0 would kill at once"


@pytest.mark.parametrize(
    ("overrides", "changes", "sentence"),
    [
        ((), {"nodes": 3}, r"train.global_batch_size = 64 is not a multiple of train.micro_batch_size = 2 times 24"),
        ((), {"nodes": 0}, r"--nodes must be at least 1, got 0"),
        ((), {"gpus_per_node": -8}, r"--gpus-per-node must be at least 0, got -8"),
        ((), {"cpus_per_task": -1}, r"--cpus-per-task must be at least 0, got -1"),
        ((), {"max_restarts": -1}, r"--max-restarts must be at least 0, got -1"),
        ((), {"time": "two days"}, r"--time two days is not a time limit; write minutes, HH:MM:SS or D-HH:MM:SS"),
        (("checkpoint.resume=never",), {}, r"checkpoint.resume = 'never' would start a requeued job from the beginning"),
        (("run.device=cuda",), {"gpus_per_node": 0}, r"run.device = 'cuda' needs GPUs, but --gpus-per-node is 0"),
        (("parallel.tensor_parallel_size=4",), {"ranks_per_node": 2}, r"tensor_parallel_size = 4 would cross nodes of 2 ranks"),
    ],
)
def test_what_could_not_run_is_refused_before_it_queues(overrides, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        made(*overrides, **changes)


def test_the_command_writes_the_script_and_the_folder_of_its_log(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.toml").write_text('[run]\ndir = "out"\n')
    app = Typer()
    app.command()(slurm_command)
    result = CliRunner().invoke(app, ["small.toml", "--nodes", "2", "--gpus-per-node", "2"])
    assert result.exit_code == 0, result.output
    assert "submit it with: sbatch small.sbatch" in result.output
    assert (tmp_path / "small.sbatch").read_text().startswith("#!/bin/bash\n#SBATCH --job-name=out\n")
    assert (tmp_path / "out/logs").is_dir()


@pytest.mark.parametrize(
    ("overrides", "output", "sentence"),
    [
        ([], "/proc/no/x.sbatch", "--output /proc/no/x.sbatch cannot be written (No such file or directory)"),
        ([], ".", "--output . cannot be written (Is a directory); name a file in a place that can be"),
        (["run.dir=small.toml/x"], None, "run.dir: small.toml/x/logs cannot be made (Not a directory); choose a place"),
    ],
)
def test_what_cannot_be_written_is_named(tmp_path, monkeypatch, overrides, output, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.toml").write_text('[run]\ndir = "out"\n')
    with pytest.raises(ValueError) as caught:
        slurm_command(Path("small.toml"), overrides, gpus_per_node=2, output=output and Path(output))
    assert sentence in str(caught.value)


def test_help_fits_a_screen_and_has_an_example():
    app = Typer()
    app.command()(slurm_command)
    text = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "80"}).output
    assert "Example: tiglon slurm" in text
    assert len(text.splitlines()) <= 40
