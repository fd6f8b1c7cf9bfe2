"""The quickstart tells public commands, repeats nothing that is done, and passes a failure on."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer

from launch.commands import quickstart
from launch.commands.quickstart import (
    QuickstartConfig,
    executable,
    last_step,
    outcome,
    quickstart_command,
    quickstart_steps,
)
from launch.load_config import load_config
from launch.shipped import shipped_names
from trainer.monitoring.records import FILE_NAME, read_records

ROOT = Path(__file__).parent.parent.parent.parent


class Ended:
    """A process that is over."""

    def __init__(self, status: int) -> None:
        self.status = status

    def wait(self) -> int:
        return self.status


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands that were run; each leaves behind what the real one would."""
    run: list[list[str]] = []
    home = tmp_path / "run"

    def make(name: str, content: str = "") -> None:
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(content)

    def fake(command: list[str], env: dict[str, str]) -> Ended:
        run.append(command)
        said = " ".join(command)
        if "launch.standard_library" in said:
            make("text/library.parquet")
        elif "tokenizer train" in said:
            make("tokenizer/tiglon_tokenizer.json")
        elif "launch prepare" in said:
            make("corpus/validation/manifest.json")
        elif "launch train" in said:
            name = command[command.index("train") + 1]
            done = load_config(name, [word for word in command if "=" in word and not word.startswith("--")]).train.steps
            make(f"checkpoints/step-{done:08d}/manifest.json", "{}")
            records = [{"kind": "train", "step": step, "loss": 8.0 / step} for step in (1, done)]
            records.append({"kind": "evaluate", "step": done, "name": "validation", "loss": 4.25})
            make(FILE_NAME, "".join(json.dumps(record) + "\n" for record in records))
        elif "launch report" in said:
            make("report/report.html")
        return Ended(0)

    monkeypatch.setattr(quickstart.subprocess, "Popen", fake)
    monkeypatch.setattr(quickstart, "matmul_seconds", lambda dtype: dtype.itemsize)
    return run


def _verbs(commands: list[list[str]]) -> list[str]:
    return [next(word for word in command[1:] if word not in ("-m", "launch")) for command in commands]


def test_every_step_is_printed_before_it_runs(tmp_path: Path, commands: list, capsys: pytest.CaptureFixture):
    quickstart_command(str(tmp_path / "run"), 40)
    assert _verbs(commands) == [
        "launch.standard_library", "tokenizer", "prepare", "train", "evaluate", "generate", "report",
    ]  # fmt: skip
    printed = [line[2:] for line in capsys.readouterr().out.splitlines() if line.startswith("$ ")]
    assert [line.split()[0] for line in printed] == ["python", "tiglon", "tiglon", "tiglon", "tiglon", "tiglon", "tiglon"]
    assert "--nproc 2" in printed[3] and "train.steps=40" in printed[3]


def test_a_second_quickstart_says_that_it_is_done(tmp_path: Path, commands: list, capsys: pytest.CaptureFixture):
    quickstart_command(str(tmp_path / "run"), 40)
    capsys.readouterr()
    commands.clear()
    quickstart_command(str(tmp_path / "run"), 40)
    assert commands == []
    out = capsys.readouterr().out
    assert "is done: 40 steps" in out and "validation loss 4.25" in out


def test_more_steps_train_on_and_tell_the_end_again(tmp_path: Path, commands: list):
    quickstart_command(str(tmp_path / "run"), 40)
    commands.clear()
    quickstart_command(str(tmp_path / "run"), 60)
    assert _verbs(commands) == ["train", "evaluate", "generate", "report"]


def test_a_failed_step_ends_with_its_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(quickstart.subprocess, "Popen", lambda command, **_: Ended(3))
    with pytest.raises(typer.Exit) as ended:
        quickstart_command(str(tmp_path / "run"), 1)
    assert ended.value.exit_code == 3
    assert "ended with status 3; fix it and run tiglon quickstart again" in capsys.readouterr().err


def test_ctrl_c_lets_the_step_save_and_says_how_to_resume(tmp_path: Path):
    """As from a terminal, where every process hears it. (Python's own way would kill the step a quarter of a second later.)"""
    step = f"""
import pathlib, time
here = pathlib.Path({str(tmp_path)!r})
try:
    (here / "begun").touch()
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(1)  # a checkpoint is being written
    (here / "saved").touch()
"""
    ask = f"""
import sys, typer
from launch.commands.quickstart import QuickstartStep, run_step
try:
    run_step(QuickstartStep("train", ["python", "-c", {step!r}]), "1/1")
except typer.Exit as ended:
    sys.exit(ended.exit_code)
"""
    process = subprocess.Popen([sys.executable, "-c", ask], stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=ROOT)
    while not (tmp_path / "begun").exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and told == "\ninterrupted; run tiglon quickstart again to resume\n"
    assert (tmp_path / "saved").exists()


def test_the_default_place_needs_no_overrides(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(quickstart, "matmul_seconds", lambda dtype: dtype.itemsize)
    launch = quickstart_steps(Path("runs/quickstart"))[3].command
    assert launch[2:] == ["quickstart", "--nproc", "2"]


def test_a_mixture_of_experts_shares_what_is_prepared(tmp_path: Path, commands: list, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quickstart, "chosen_precision", lambda directory: "bf16")
    assert {choice.value for choice in QuickstartConfig} == {n for n in shipped_names() if n.startswith("quickstart")}
    moe = quickstart_steps(Path("runs/quickstart-moe"), 0, QuickstartConfig.quickstart_moe)
    assert [step.command for step in moe[:3]] == [step.command for step in quickstart_steps(Path("runs/quickstart"))[:3]]
    assert moe[3].command == ["tiglon", "train", "quickstart-moe", "--nproc", "2"]
    assert moe[4].command == ["tiglon", "evaluate", "runs/quickstart-moe"]


def test_a_mixture_in_a_directory_of_its_own(tmp_path: Path, commands: list, capsys: pytest.CaptureFixture):
    home = tmp_path / "run"
    quickstart_command(str(home), 40, QuickstartConfig.quickstart_moe)
    assert (
        _verbs(commands)[3] == "train" and "quickstart-moe" in commands[3] and f"data.train={home}/corpus/train" in commands[3]
    )
    assert all(str(home) in " ".join(command) for command in commands)
    quickstart_command(str(home), 40, QuickstartConfig.quickstart_moe)
    assert f"tiglon quickstart --config quickstart-moe --dir {home} --steps N" in capsys.readouterr().out


def test_the_readme_tells_the_same_commands():
    readme = (Path(__file__).parents[3] / "README.md").read_text()
    told = [shlex.split(line.strip()[2:], comments=True) for line in readme.splitlines() if line.startswith("    $ ")]
    for step, command in zip(quickstart_steps(Path("runs/quickstart")), told, strict=False):
        assert command[0] == step.command[0] and set(command) <= set(step.command), command
    assert len(told) >= len(quickstart_steps(Path("runs/quickstart")))
    assert ["tiglon", "quickstart", "--config", "quickstart-moe"] in told


def test_a_cpu_that_is_slow_at_bf16_trains_in_fp32_and_stays_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(quickstart.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(quickstart, "matmul_seconds", lambda dtype: 1 / dtype.itemsize)
    assert "train.precision=fp32" in quickstart_steps(tmp_path)[3].command
    (tmp_path / "config.toml").write_text("[train]\nprecision = 'bf16'\n")
    assert "train.precision=fp32" not in quickstart_steps(tmp_path)[3].command


def test_a_shown_command_runs_with_this_python():
    assert executable(["tiglon", "report", "x"]) == [sys.executable, "-m", "launch", "report", "x"]
    with pytest.raises(ValueError, match="got rm"):
        executable(["rm"])


def test_nothing_yet(tmp_path: Path):
    assert last_step(tmp_path) == 0
    assert outcome(tmp_path) == "no training step yet"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_story(tmp_path: Path):
    """Minutes on two cores: the shipped configuration, really trained."""
    home = tmp_path / "run"
    command = [sys.executable, "-m", "launch", "quickstart", "--dir", str(home)]
    first = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert first.returncode == 0, first.stdout + first.stderr
    records = read_records(home / FILE_NAME)
    losses = {record["step"]: record["loss"] for record in records if record["kind"] == "train"}
    held_out = [record["loss"] for record in records if record["kind"] == "evaluate"]
    assert held_out[-1] < 0.55 * losses[1]
    assert (home / "report" / "report.html").is_file()
    second = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert second.returncode == 0 and "is done" in second.stdout
    assert read_records(home / FILE_NAME) == records
