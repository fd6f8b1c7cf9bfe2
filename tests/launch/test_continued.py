"""A run that resumes with other data or larger batches is the run that was planned so from the beginning."""

import re
from pathlib import Path

import pytest

from launch.config import load_config
from tests.launch.faults import run_main
from tests.launch.test_train import losses, run, same_weights
from trainer.config import TrainConfig
from trainer.monitoring.records import read_records

LARGER = ["train.global_batch_size=16"]
RAMP = [*LARGER, "train.batch_ramp=[[8,8]]"]
ENGINES = {
    "zero-1": [],
    "zero-2": ["parallel.zero_stage=2"],
    "zero-3": ["parallel.zero_stage=3"],
    "zero-1-offloaded": ["parallel.offload=cpu"],
    "fold": ["parallel.engine=fold", "optimizer.name=tiger"],
    "tensor-parallel": ["parallel.tensor_parallel_size=2"],
}


def phase(step: int, corpus: Path, weight: int = 1) -> str:
    sources = f'{{path="{corpus}/shards/validation",weight={weight}}},{{path="{corpus}/shards/train"}}'
    return f"data.curriculum=[{{from_step={step},sources=[{sources}]}}]"


def last(directory: Path) -> Path:
    return directory / "checkpoints/step-00000012"


def test_a_stable_run_is_annealed_on_another_mixture(configuration: str, corpus: Path, tmp_path: Path):
    """The schedule and the mixture change from step 8 on; the steps before are those of either."""
    kind = "schedule.kind=warmup-stable-decay"
    anneal = [kind, "schedule.decay_steps=4", phase(8, corpus)]
    run(configuration, *anneal, f"run.dir={tmp_path}/planned")
    run(configuration, kind, "schedule.decay_steps=1", "train.steps=10")
    screen = run(
        configuration, *anneal, f"run.dir={tmp_path}/annealed", f"checkpoint.resume={tmp_path}/run/checkpoints/step-00000008"
    )
    assert "data.curriculum: [] -> " in screen and "schedule.decay_steps: 1 -> 4" in screen
    planned = {step: loss for step, loss in losses(tmp_path / "planned").items() if step > 8}
    assert losses(tmp_path / "annealed") == planned
    assert same_weights(last(tmp_path / "annealed"), last(tmp_path / "planned"))


@pytest.mark.parametrize("step", [8, 10])
def test_a_later_phase_is_free(configuration: str, corpus: Path, tmp_path: Path, step: int):
    run(configuration, phase(step, corpus), f"run.dir={tmp_path}/planned")
    run(configuration, "train.steps=8")
    assert "data.curriculum: [] -> " in run(configuration, phase(step, corpus))
    assert same_weights(last(tmp_path / "run"), last(tmp_path / "planned"))
    assert losses(tmp_path / "run") == losses(tmp_path / "planned")


def test_a_later_phase_is_changed_or_dropped(configuration: str, corpus: Path, tmp_path: Path):
    run(configuration, phase(9, corpus, weight=5), f"run.dir={tmp_path}/planned")
    run(configuration, phase(8, corpus), "train.steps=8")
    run(configuration, phase(9, corpus, weight=5))
    assert same_weights(last(tmp_path / "run"), last(tmp_path / "planned"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("phase", "the mixture is 1 of .*/validation to 1 of .*/train from step 7 on, and was not when those steps were done"),
        ("train", "the mixture was 1 of .*/shards/train from step 0 on and is 1 of .*/shards/validation from step 0 on"),
        ("run.seed=3", r"run\.seed was 0 and is 3"),
        ("train.sequence_length=16", r"train\.sequence_length was 32 and is 16"),
    ],
)
def test_the_past_is_not(configuration: str, corpus: Path, tmp_path: Path, change: str, words: str):
    run(configuration, "train.steps=8")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    options = {"phase": phase(7, corpus), "train": f"data.train={corpus}/shards/validation"}.get(change, change)
    statuses, screen = run_main(1, tmp_path / "screens", [configuration, options])
    assert statuses == [2]
    assert re.search(words, screen) and "run.dir=NEW" in screen
    assert ("[[data.curriculum]] with from_step = 8" in screen) == ("mixture" in words)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_a_larger_batch_from_a_checkpoint_on(configuration: str, tmp_path: Path):
    run(configuration, *RAMP, f"run.dir={tmp_path}/planned")
    run(configuration, "train.steps=8")
    screen = run(configuration, *LARGER)
    assert "train.global_batch_size: 8 -> 16" in screen and "train.batch_ramp: [] -> [[8, 8]]" in screen
    assert "as in" not in "".join(line for line in screen.splitlines() if "batch_ramp" in line)
    assert same_weights(last(tmp_path / "run"), last(tmp_path / "planned"))
    assert losses(tmp_path / "run") == losses(tmp_path / "planned")
    tokens = {
        record["step"]: record["tokens"] for record in read_records(tmp_path / "run/metrics.jsonl") if record["kind"] == "train"
    }
    train = load_config(tmp_path / "run/config.toml").train
    assert train.batch_ramp == [(8, 8)] and train.global_batch_size == 16, "the file asks for the same run in another directory"
    assert tokens[12] == (8 * 8 + 4 * 16) * train.sequence_length and tokens[8] == 8 * 8 * train.sequence_length
    assert "has all 12 steps" in run(configuration, *LARGER), "the same command again changes nothing"


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_a_ramp_gives_the_same_bits_however_it_is_come_by(configuration: str, tmp_path: Path, engine: str):
    """Batches of 4, 8 and 16 sequences are 1, 2 and 4 micro-batches on two ranks; under tensor parallelism 2, 4 and 8."""
    options = [configuration, "train.micro_batch_size=2", "train.precision=bf16", *ENGINES[engine]]
    planned = [*options, *LARGER, "train.batch_ramp=[[3,4],[8,8]]"]
    assert run_main(2, tmp_path / "a", [*planned, f"run.dir={tmp_path}/planned"])[0] == [0, 0]
    for more in (["train.steps=3", "train.global_batch_size=4"], ["train.steps=8", "train.global_batch_size=8"], LARGER):
        statuses, screen = run_main(2, tmp_path / "b", [*options, *more])
        assert statuses == [0, 0], screen
    assert losses(tmp_path / "run") == losses(tmp_path / "planned")
    assert same_weights(last(tmp_path / "run"), last(tmp_path / "planned"))


@pytest.mark.parametrize(
    ("ramp", "words"),
    [
        ([(5, 8), (5, 16)], "increasing steps"),
        ([(0, 8)], "increasing steps above 0"),
        ([(5, 0)], "at least 1 sequence"),
    ],
)
def test_a_ramp_that_is_none_is_refused(ramp: list[tuple[int, int]], words: str):
    with pytest.raises(ValueError, match=words):
        TrainConfig(batch_ramp=ramp)
