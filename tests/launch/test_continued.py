"""A run that resumes with other data or larger batches is the run that was planned so from the beginning."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from data.config import DataConfig
from data.corpus.stream import Batch, BatchShape, Stream
from launch.commands.data import data_app
from launch.load_config import load_config
from model.flops import flops_per_token
from tests.launch.faults import Fault, run_main
from tests.launch.test_train import losses, rank_main, run, same_weights
from tests.ranks import run_ranks
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
        ("phase", "the mixture is 1 of .*/validation to 1 of .*/train from batch 7 on, and was not when those"),
        ("train", "the mixture was 1 of .*/shards/train from batch 0 on and is 1 of .*/shards/validation from batch 0 on"),
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


def recording_main(rank: int, world_size: int, arguments: list[str], screen: str) -> int:
    """A rank that writes the rows of every batch that it trains on, by the number of its update, to SCREEN-RANK.rows."""
    read = Stream._read

    def both(stream: Stream, batch: int) -> list[Batch]:
        found = read(stream, batch)
        with open(f"{screen}-{rank}.rows", "a") as file:
            file.write(json.dumps([row.tolist() for part in found for row in part.inputs_BS]) + "\n")
        return found

    Stream._read = both
    return rank_main(rank, world_size, arguments, screen)


def trained_rows(configuration: str, folder: Path, *options: str, ranks: int = 1) -> list[list[list[int]]]:
    """Run to the end; the rows of each batch that was read, in order, over all ranks."""
    folder.mkdir()
    arguments = [configuration, "data.prefetch_steps=0", *options]
    found = run_ranks(recording_main, ranks, arguments, f"{folder}/screen", grouped=False)
    assert found == [0] * ranks, (folder / "screen-0").read_text()
    read = [map(json.loads, (folder / f"screen-{rank}.rows").read_text().splitlines()) for rank in range(ranks)]
    return [[row for part in parts for row in part] for parts in zip(*read, strict=True)]


def expected_rows(corpus: Path, sizes: list[int], first: int = 0) -> list[list[list[int]]]:
    """The samples of batches of these sizes, counted here and each read alone."""
    alone = Stream(DataConfig(train=f"{corpus}/shards/train", prefetch_steps=0), "train", BatchShape(32, 1, 1), 0, 1, 0)
    numbers = iter(range(first, first + sum(sizes)))
    return [[alone.batches(next(numbers))[0].inputs_BS[0].tolist() for _ in range(size)] for size in sizes]


def audit(*words: str) -> tuple[int, str]:
    told = CliRunner().invoke(data_app, ["audit", *words, "--samples", "0"], env={"COLUMNS": "200"}, catch_exceptions=False)
    return told.exit_code, told.output


def sizes_of(last: int, *ramp: list[int]) -> list[str]:
    return [f"train.global_batch_size={last}", *([f"train.batch_ramp={[*ramp]}"] if ramp else [])]


FOLD = ["parallel.engine=fold", "optimizer.name=tiger"]
RESUMED = {
    "a ramp in the file": ([(4, 1, sizes_of(4, [2, 2])), (6, 1, sizes_of(8, [2, 2]))], [2, 2, 4, 4, 8, 8]),
    "larger micro-batches": (
        [(4, 1, sizes_of(4)), (6, 1, [*sizes_of(16), "train.micro_batch_size=8"])],
        [4, 4, 4, 4, 16, 16],
    ),
    "more ranks": ([(3, 1, sizes_of(2)), (5, 2, sizes_of(8))], [2, 2, 2, 8, 8]),
    "more ranks, fold": ([(3, 1, [*FOLD, *sizes_of(2)]), (5, 2, [*FOLD, *sizes_of(8)])], [2, 2, 2, 8, 8]),
    "smaller, fold": ([(3, 2, [*FOLD, *sizes_of(8)]), (5, 1, [*FOLD, *sizes_of(2)])], [8, 8, 8, 2, 2]),
    "smaller, ZeRO 3": (
        [(3, 2, ["parallel.zero_stage=3", *sizes_of(8)]), (5, 1, ["parallel.zero_stage=3", *sizes_of(2)])],
        [8, 8, 8, 2, 2],
    ),
    "several resumes": ([(2, 1, sizes_of(2)), (4, 1, sizes_of(4)), (5, 2, sizes_of(8))], [2, 2, 4, 4, 8]),
    "the middle of a ramp": ([(3, 1, sizes_of(8, [2, 2], [5, 4])), (6, 2, sizes_of(16))], [2, 2, 4, 16, 16, 16]),
    "a ramp that is over": (
        [(3, 1, sizes_of(4, [2, 2])), (5, 1, [*sizes_of(8), "train.micro_batch_size=4", "train.batch_ramp=[]"])],
        [2, 2, 4, 8, 8],
    ),
}


@pytest.mark.parametrize("case", [name if not index else pytest.param(name, marks=pytest.mark.slow)
                                  for index, name in enumerate(RESUMED)])  # fmt: skip
def test_each_batch_holds_the_samples_after_those_before(configuration: str, corpus: Path, tmp_path: Path, case: str):
    """And RUN/config.toml asks for the same, in the audit, when it is resumed and in another directory."""
    starts, sizes = RESUMED[case]
    rows = []
    for number, (steps, ranks, options) in enumerate(starts):
        rows += trained_rows(configuration, tmp_path / f"{number}", *options, f"train.steps={steps}", ranks=ranks)
    assert rows == expected_rows(corpus, sizes)
    records = read_records(tmp_path / "run/metrics.jsonl")
    tokens = {record["step"]: record["tokens"] for record in records if record["kind"] == "train"}
    assert tokens == {step: 32 * sum(sizes[:step]) for step in range(1, len(sizes) + 1)}
    for target in (f"{tmp_path}/run", f"{tmp_path}/run/config.toml"):
        status, told = audit(target)
        assert status == 0 and "was trained by this plan" in told and f" {sum(sizes)} " in told, told
    file = f"{tmp_path}/run/config.toml"
    again = trained_rows(file, tmp_path / "again", f"run.dir={tmp_path}/new", "train.micro_batch_size=1")
    assert again == rows
    assert trained_rows(file, tmp_path / "on", f"train.steps={len(sizes) + 1}") == expected_rows(corpus, sizes[-1:], sum(sizes))


def test_a_ramp_that_was_not_trained_is_refused(configuration: str, tmp_path: Path):
    run(configuration, "train.steps=4")
    source = f"{tmp_path}/run/checkpoints/step-00000004"
    for target in ([], [f"run.dir={tmp_path}/other", f"checkpoint.resume={source}"]):
        screen = run(configuration, "train.batch_ramp=[[2,2]]", *target, status=2)
        assert (
            f"resuming from {source} would change the order of the data: the sizes of the 4 batches so far were 8 and are"
            in screen
        )
        assert "are 2 until batch 2, then 8 (train.batch_ramp = [[4, 8]] keeps them" in screen and screen.count("\n") == 1
        status, told = audit(configuration, "train.batch_ramp=[[2,2]]", *target)
        assert status == 1 and "FAULT" in told and "so far were 8 and are 2 until batch 2, then 8" in told
    assert not (tmp_path / "other").exists()


def test_a_size_to_come_that_does_not_divide_is_refused(configuration: str, tmp_path: Path):
    run(configuration, "train.steps=4")
    for options, words in (
        (["train.batch_ramp=[[4,8],[9,6]]", "train.micro_batch_size=4"], "train.batch_ramp has 6 sequences, which is not a"),
        (["train.micro_batch_size=3"], "train.global_batch_size = 8 is not divisible by train.micro_batch_size = 3"),
    ):
        screen = run(configuration, *options, status=2)
        assert words in screen and screen.count("\n") == 1


SPIKES = ["health.spike_sigmas=6", "health.spike_window_steps=16", "checkpoint.every_steps=8", "health.spike_action=rewind"]


@pytest.mark.slow
@pytest.mark.parametrize("engine", [[], FOLD])
def test_what_rewinds_left_behind_is_counted_and_not_called_trained(
    configuration: str, corpus: Path, tmp_path: Path, engine: list[str]
):
    """A spike at update 20 goes back to step 16 when batch 20 was read: 5 batches are left behind."""
    options = [configuration, *engine, *SPIKES, *sizes_of(8, [18, 2]), "train.steps=24"]
    statuses, screen = run_main(1, tmp_path / "screens", options, Fault("spike", 19, rank=None))
    assert statuses == [0], screen
    passed = (
        int(re.search(r'"batch": (\d+)', (last(tmp_path / "run").with_name("step-00000024") / "manifest.json").read_text())[1])
        - 24
    )  # type: ignore[index]
    assert f"step 16 continues with batch {16 + passed}, since rewinds left {passed} batches behind" in screen
    read, trained = 18 * 2 + (6 + passed) * 8, 16 * 2 + 8 * 8
    status, told = audit(f"{tmp_path}/run")
    assert status == 0 and f" {read} " in told, told
    assert (
        f"but for {passed} batches ({read - trained} samples) of the {24 + passed} it read, which rewinds left behind" in told
    )
    second = f"data.curriculum=[{{from_step={24 + passed},sources=[{{path='{corpus}/shards/validation'}}]}}]"
    statuses, screen = run_main(1, tmp_path / "screens", [*options[:-1], "train.steps=26", second])
    assert statuses == [0], screen
    assert f"step 24 continues with batch {24 + passed}, since rewinds left {passed} batches behind" in screen
    assert f"26 steps, {(trained + 16) * 32:,} tokens" in screen
    record = read_records(tmp_path / "run/metrics.jsonl")
    assert [item["tokens"] for item in record if item["kind"] == "train"][-1] == (trained + 16) * 32
    status, told = audit(f"{tmp_path}/run")
    assert status == 0 and re.search(rf"shards/train .* {read} ", told) and re.search("shards/validation .* 16 ", told), told


LONGER = "train.length_ramp=[[4,8],[8,16]]"
"""Rows of 32 tokens at last."""


@pytest.mark.parametrize("step", [3, 4, 6, 8])
def test_rows_become_longer_whatever_the_run_resumes_from(configuration: str, tmp_path: Path, step: int):
    """In a phase and where the next one begins; the length left unset is the checkpoint's, and so is the ramp."""
    run(configuration, LONGER, f"run.dir={tmp_path}/planned")
    run(configuration, LONGER, f"train.steps={step}")
    run(configuration, "train.steps=12")
    assert losses(tmp_path / "run") == losses(tmp_path / "planned")
    assert same_weights(last(tmp_path / "run"), last(tmp_path / "planned"))
    assert load_config(tmp_path / "run/config.toml").train.length_ramp == [(4, 8), (8, 16)]


def test_shorter_rows_count_as_many_tokens_and_fewer_operations(configuration: str, tmp_path: Path):
    screen = run(configuration, LONGER, "log.every_steps=1")
    assert "rows       8 until batch 4, then 16 until batch 8, then 32 tokens each" in screen
    records = [record for record in read_records(tmp_path / "run/metrics.jsonl") if record["kind"] == "train"]
    assert [record["tokens"] for record in records] == [256 * step for step in range(1, 13)]
    model = load_config(configuration).model
    for record, length in zip(records, [8] * 4 + [16] * 4 + [32] * 4, strict=True):
        causal, full = (flops_per_token(model, length, causal) for causal in (True, False))
        assert record["mfu_full"] / record["mfu"] == pytest.approx(full / causal, rel=1e-9)


def test_other_lengths_from_here_on_and_other_lengths_so_far(configuration: str, tmp_path: Path):
    run(configuration, LONGER, "train.steps=6")
    screen = run(configuration, "train.length_ramp=[[4,8],[7,16]]", "train.steps=8", f"run.dir={tmp_path}/run")
    assert "train.length_ramp: [[4, 8], [8, 16]] -> [[4, 8], [7, 16]]" in screen
    screen = run(configuration, "train.length_ramp=[[4,16]]", status=2)
    assert "the rows of the 8 batches so far had 8 until batch 4, then 16 until batch 7, then 32 tokens and have" in screen


def test_whole_documents_are_kept_by_a_run_that_resumes(configuration: str, tmp_path: Path):
    whole = ["data.pack=documents", "data.document_mask=true"]
    run(configuration, *whole, f"run.dir={tmp_path}/planned")
    screen = run(configuration, *whole, "train.steps=6")
    assert re.search(r"rows of whole documents, \d+\.\d\d% of them padding", screen)
    run(configuration, "train.steps=12")
    assert losses(tmp_path / "run") == losses(tmp_path / "planned")
    assert same_weights(last(tmp_path / "run"), last(tmp_path / "planned"))
    screen = run(configuration, "data.pack=stream", "train.steps=14", status=2)
    assert "would change the order of the data: data.pack was documents and is stream; restore it" in screen
    status, told = audit(f"{tmp_path}/run")
    assert status == 0 and "padding" in told and "was trained by this plan" in told


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
