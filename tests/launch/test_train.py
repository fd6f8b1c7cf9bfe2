"""Whole runs, started as a user starts them."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import launch.observers
from launch.checkpoints import find_checkpoint, read_tensor, tensor_names
from launch.commands.train import run_ranks as start_ranks
from launch.load_config import load_config
from launch.run_end import RunEnd, Stage
from launch.runtime import ALONE
from launch.train import main
from tests.ranks import run_ranks
from trainer.checkpoint.staging import Staging

ROOT = Path(__file__).parent.parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def command(configuration: str, *overrides: str, ranks: int = 1, restarts: int = 0) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", f"--max-restarts={restarts}"]
    return [sys.executable, *(torchrun if ranks > 1 else []), "-m", "launch.train", configuration, *overrides]


def rank_main(rank: int, world_size: int, arguments: list[str], screen: str) -> int:
    descriptor = os.open(f"{screen}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 2)
    return main(arguments)


def run(configuration: str, *overrides: str, ranks: int = 1, status: int = 0, screen: str = "") -> str:
    """Run to the end, as torchrun would start the ranks; what was on the screen, which files `screen`-RANK keep."""
    screen = screen or f"{configuration}.screen"
    method = "spawn" if "run.device=cuda" in overrides else "forkserver"
    found = run_ranks(rank_main, ranks, [configuration, *overrides], screen, grouped=False, method=method)
    text = "".join(Path(f"{screen}-{rank}").read_text() for rank in range(ranks))
    assert found == [status] * ranks, text
    return text


def torchrun(configuration: str, *overrides: str, ranks: int) -> str:
    """The same through torchrun itself."""
    arguments = command(configuration, *overrides, ranks=ranks)
    done = subprocess.run(arguments, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stderr


def losses(directory: Path) -> dict[int, float]:
    records = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["loss"] for record in records if record["kind"] == "train"}


def same_weights(one: Path, other: Path) -> bool:
    return tensor_names(one).keys() == tensor_names(other).keys() and all(
        read_tensor(one, name).equal(read_tensor(other, name)) for name in tensor_names(one)
    )


def assert_resumed_is_unbroken(configuration: str, tmp_path: Path, *options: str, ranks: int) -> None:
    run(configuration, *options, f"run.dir={tmp_path}/whole", ranks=ranks)
    run(configuration, *options, "train.steps=6", ranks=ranks)
    assert "resumed from" in run(configuration, *options, ranks=ranks)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole") and len(losses(tmp_path / "run")) == 12
    assert same_weights(tmp_path / "run/checkpoints/step-00000012", tmp_path / "whole/checkpoints/step-00000012")
    assert "has all 12 steps" in run(configuration, *options, ranks=ranks)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(configuration: str, tmp_path: Path, stage: int):
    assert_resumed_is_unbroken(configuration, tmp_path, f"parallel.zero_stage={stage}", ranks=2)


WINDOW = "model.sliding_window=16"
LATENT = ["model.attention=mla", "model.kv_lora_rank=32", "model.qk_nope_head_dim=16", "model.qk_rope_head_dim=8"]
LATENT += ["model.v_head_dim=16"]


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [[], [WINDOW], [*LATENT, WINDOW]], ids=["", "window", "mla"])
@pytest.mark.parametrize("engine", ["zero", "fold"])
def test_a_resumed_run_is_the_unbroken_one_on_a_gpu(configuration: str, tmp_path: Path, engine: str, heads: list[str]):
    """MLA with a window would go to cuDNN, whose backward sums in no fixed order."""
    options = ["run.device=cuda", "run.deterministic=true", "train.precision=bf16", "optimizer.name=tiger"]
    options += [f"parallel.engine={engine}", *heads]
    assert_resumed_is_unbroken(configuration, tmp_path, *options, ranks=1)


def slow_rank_main(rank: int, world_size: int, arguments: list[str], screen: str) -> int:
    at_once = Staging._copy

    def late(staging: Staging, pairs: list) -> None:
        time.sleep(0.5)
        at_once(staging, pairs)

    Staging._copy = late
    return rank_main(rank, world_size, arguments, screen)


@pytest.mark.parametrize("engine", ["zero", "fold"])
def test_a_run_waits_for_the_copy_before_it_changes_the_state(configuration: str, tmp_path: Path, engine: str):
    """Steps take less than the slowed copy, so that a run which did not wait would save what later steps made of it."""
    options = [f"parallel.engine={engine}", "optimizer.name=tiger", "optimizer.max_grad_norm=0", "train.steps=3"]
    options += ["checkpoint.every_steps=1", "checkpoint.keep=9"]
    for kind, function in (("false", rank_main), ("true", slow_rank_main)):
        arguments = [configuration, *options, f"checkpoint.asynchronous={kind}", f"run.dir={tmp_path}/{kind}"]
        assert run_ranks(function, 2, arguments, f"{tmp_path}/screen", grouped=False) == [0, 0]
    for step in ("step-00000001", "step-00000002", "step-00000003"):
        assert same_weights(tmp_path / "true/checkpoints" / step, tmp_path / "false/checkpoints" / step)


def rank_main_that_dies_in_an_evaluation(rank: int, world_size: int, arguments: list[str], screen: str) -> int:
    launch.observers.evaluate = lambda *arguments: os._exit(9)  # type: ignore[assignment]
    return rank_main(rank, world_size, arguments, screen)


def test_a_step_is_saved_before_its_observations(configuration: str, corpus: Path, tmp_path: Path):
    """Where both are due at a step, the last one too: even an evaluation that kills the process costs no work."""
    arguments = [configuration, f"data.validation={corpus}/shards/validation", "checkpoint.asynchronous=false"]
    for step in (4, 12):  # every_steps, and the end
        arguments.append(f"evaluate.every_steps={step}")
        with pytest.raises(AssertionError, match="died without a word"):
            run_ranks(rank_main_that_dies_in_an_evaluation, 1, arguments, f"{tmp_path}/screen", grouped=False)
        assert find_checkpoint(tmp_path / "run").endswith(f"step-{step:08d}")


def test_another_layout_continues_the_same_curve(configuration: str, tmp_path: Path):
    run(configuration, f"run.dir={tmp_path}/whole")
    run(configuration, "train.steps=4", "parallel.tensor_parallel_size=2", "parallel.zero_stage=3", ranks=4)
    for name, ranks, size in (("1x1", 1, 1), ("1x2", 2, 1), ("2x1", 2, 2)):
        source = f"checkpoint.resume={tmp_path}/run/checkpoints/step-00000004"
        run(configuration, source, f"run.dir={tmp_path}/{name}", f"parallel.tensor_parallel_size={size}", ranks=ranks)
        after = losses(tmp_path / name)
        assert list(after) == list(range(5, 13))
        assert after == pytest.approx({step: loss for step, loss in losses(tmp_path / "whole").items() if step > 4}, rel=1e-5)


def test_a_killed_rank_is_restarted_and_ends_with_the_same_bits(configuration: str, tmp_path: Path):
    run(configuration, f"run.dir={tmp_path}/whole", "train.steps=40", ranks=2)
    process = subprocess.Popen(
        command(configuration, "train.steps=40", ranks=2, restarts=1), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    checkpoints = tmp_path / "run/checkpoints"
    while not list(checkpoints.glob("step-*")):
        assert process.poll() is None
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, screen = process.communicate(timeout=200)
    assert process.returncode == 0 and "resumed from" in screen
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert same_weights(checkpoints / "step-00000040", tmp_path / "whole/checkpoints/step-00000040")


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (["train.stesp=3"], "unknown key train.stesp; did you mean steps?"),
        (["train.steps=soon"], "train.steps = 'soon': input should be a valid integer"),
        (["parallel.zero_stage=0"], "parallel.zero_stage = 0: input should be 1, 2 or 3"),
        (["parallel.tensor_parallel_size=3"], "model.num_attention_heads = 4 is not divisible"),
        (["parallel.tensor_parallel_size=2"], "1 rank cannot form groups of parallel.tensor_parallel_size = 2"),
        (["train.global_batch_size=9"], "train.global_batch_size = 9 is not divisible by train.micro_batch_size = 2"),
        (["data.train=/nowhere"], "/nowhere"),
        (["model.vocab_size=128"], "more than model.vocab_size = 128"),
        (["run.device=cuda"], "torch finds no CUDA device here"),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_written(
    configuration: str, tmp_path: Path, capsys: pytest.CaptureFixture, overrides: list[str], wanted: str
):
    assert main([configuration, *overrides]) == 2
    screen = capsys.readouterr().err
    assert wanted in screen and screen.startswith("tiglon: ") and screen.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_help_is_no_mistake(capsys: pytest.CaptureFixture):
    assert main(["--help"]) == 0 and capsys.readouterr().out.startswith("usage: torchrun ")
    assert main([]) == 2 and capsys.readouterr().err.startswith("tiglon: usage: torchrun ")


def test_compiling_without_a_compiler_is_refused(configuration: str, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main([configuration, "train.compile=true"]) == 2
    screen = capsys.readouterr().err
    assert "needs a C++ compiler and g++ is not there; install one or leave both off" in screen and screen.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_cuda_graphs_on_a_cpu_are_refused(configuration: str, tmp_path: Path, capsys):
    assert main([configuration, "train.precision=bf16", "train.compile=true", "train.cuda_graphs=true"]) == 2
    screen = capsys.readouterr().err
    assert screen == "tiglon: train.cuda_graphs = true needs a GPU and this rank runs on a CPU; leave it off\n"
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_that_is_not_the_shards_is_refused(configuration: str, corpus: Path, tmp_path: Path, capsys):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    description = json.loads((corpus / "tokenizer/tiglon_tokenizer.json").read_text())
    (foreign / "tokenizer.model").write_bytes((corpus / "tokenizer/tokenizer.model").read_bytes() + b"\n")
    (foreign / "tiglon_tokenizer.json").write_text(json.dumps(description))
    assert main([configuration, f"data.tokenizer={foreign}"]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_foreign_checkpoint_is_refused_and_left_alone(configuration: str, tmp_path: Path):
    run(configuration, "train.steps=4")
    before = (tmp_path / "run/metrics.jsonl").read_text()
    screen = run(configuration, "model.hidden_size=64", status=2)
    assert "is of another model: its model.hidden_size is 32, this run's 64" in screen and "Traceback" not in screen
    screen = run(configuration, "train.sequence_length=16", status=2)
    assert "would change the order of the data: train.sequence_length was 32 and is 16" in screen
    assert (tmp_path / "run/metrics.jsonl").read_text() == before
    assert (tmp_path / "run/checkpoints/step-00000004").is_dir()


def test_what_a_person_sees(configuration: str, tmp_path: Path):
    screen = torchrun(configuration, "train.steps=4", "parallel.tensor_parallel_size=2", ranks=2)
    for word in ("parameters", "tensor 2, data 1, ZeRO 1", "tokens", "kB of training state", "step 4/4", "complete after"):
        assert word in screen
    assert not re.search("deepspeed|megatron|apex|warning", screen, re.IGNORECASE)
    assert "untested optimizer" in (tmp_path / "run/logs/rank-0.log").read_text()


def test_weights_alone_start_a_new_run(configuration: str, tmp_path: Path):
    run(configuration, "train.steps=8")
    source = f"checkpoint.resume={tmp_path}/run/checkpoints/step-00000008"
    screen = run(
        configuration, source, f"run.dir={tmp_path}/new", "checkpoint.reset_optimizer=true", "run.seed=5", "train.steps=2"
    )
    assert "weights from" in screen
    first = losses(tmp_path / "new")[1]
    assert list(losses(tmp_path / "new")) == [1, 2] and first < losses(tmp_path / "run")[1] - 0.3


def test_observations_do_not_change_the_run(configuration: str, tmp_path: Path, corpus: Path):
    options = ["train.steps=4", "parallel.zero_stage=3", f"data.validation={corpus}/shards/validation", "evaluate.tokens=256"]
    run(configuration, *options, ranks=2)
    run(
        configuration, *options, "log.attention_every_steps=2", "log.sample_prompt=def", f"run.dir={tmp_path}/observed", ranks=2
    )
    assert losses(tmp_path / "observed") == losses(tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "observed/metrics.jsonl").read_text().splitlines()]
    layers = [(r["step"], r["name"]) for r in records if r["kind"] == "attention"]
    assert layers == [(2, "layer-0"), (2, "layer-1"), (4, "layer-0"), (4, "layer-1")]
    assert all(r["entropy"] > 0 and 0 < r["concentration"] <= 1 for r in records if r["kind"] == "attention")
    assert [r["name"] for r in records if r["kind"] == "evaluate"] == ["validation"]
    assert [r["text"][:3] for r in records if r["kind"] == "text"] == ["def"]


@pytest.mark.parametrize(
    ("directory", "sentence"),
    [
        ("run.toml/x", " = '{0}/run.toml/x' cannot be a directory: {0}/run.toml is a file; give another path"),
        ("taken", ": {0}/taken/logs cannot be made (File exists); choose a place that can be written"),
        ("busy", ": {0}/busy/logs/rank-0.log cannot be written (Is a directory); make it writable or choose another"),
    ],
)
def test_a_run_directory_that_cannot_be_written_is_named(configuration: str, tmp_path: Path, directory: str, sentence: str):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/logs").touch()
    (tmp_path / "busy/logs/rank-0.log").mkdir(parents=True)
    screen = run(configuration, f"run.dir={tmp_path}/{directory}", status=2)
    assert screen == f"tiglon: run.dir{sentence.format(tmp_path)}\n"


def test_fewer_than_no_restarts_are_refused(configuration: str):
    with pytest.raises(ValueError, match="--max-restarts must be at least 0, got -1"):
        start_ranks(2, -1, load_config(configuration), [configuration])


def test_the_sentence_reaches_the_screen_when_the_disk_of_the_log_is_full(capsys: pytest.CaptureFixture, monkeypatch):
    ending = RunEnd(ALONE, sys.stderr, keep_log=lambda: Path("/full/rank-0.log"))
    ending.reach(Stage.LOCKED)
    with open("/dev/full", "w", buffering=1) as log, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", log)
        assert ending.failed(OSError("no room")) == 1
        with contextlib.suppress(OSError):
            log.close()
    assert capsys.readouterr().err == "tiglon: while starting: OSError: no room\n"
