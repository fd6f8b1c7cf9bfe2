"""What earlier lineages left in a run directory is neither used nor destroyed."""

import contextlib
import json
import os
import shutil
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data.storage import open_store, replace_file
from launch.checkpoints import find_checkpoint, read_meta
from launch.load_config import load_config
from launch.resume import read_lineage, take_directory
from launch.runtime import ALONE
from tests.launch.faults import Fault, run_main
from tests.launch.test_train import losses, run, same_weights
from trainer.checkpoint.directory import saved_steps
from trainer.checkpoint.lineage import Lineage
from trainer.checkpoint.lock import FileLock
from trainer.checkpoint.manifest import CheckpointMeta
from trainer.monitoring.records import FILE_NAME, read_records
from trainer.monitoring.weights_and_biases import WeightsAndBiases

OLD, MINE = Lineage("old"), Lineage("mine")
WANDB_FILE = WeightsAndBiases.run_file


def test_a_resume_keeps_what_the_first_start_was_told(configuration: str, tmp_path: Path):
    run(configuration, "optimizer.adamw.learning_rate=2e-3", f"run.dir={tmp_path}/whole")
    run(configuration, "optimizer.adamw.learning_rate=2e-3", "train.steps=8")
    screen = run(configuration)
    path = f"{tmp_path}/run/checkpoints/step-00000008"
    assert f"as in {path}: optimizer.adamw.learning_rate = 0.002 (left unset; the default is 0.001)\n" in screen
    assert f"changed since {path}: train.steps: 8 -> 12\n" in screen
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert load_config(tmp_path / "run/config.toml").optimizer.adamw.learning_rate == 2e-3, (
        "it was asked for, by an earlier start"
    )


def run_steps(directory: Path) -> list[int]:
    return saved_steps(open_store(str(directory / "checkpoints")))


@pytest.mark.slow
def test_a_path_is_left_behind_by_a_run_that_has_its_own_checkpoints(configuration: str, tmp_path: Path):
    for options in ([f"run.dir={tmp_path}/whole"], ["train.steps=4", f"run.dir={tmp_path}/first"]):
        assert run_main(1, tmp_path / "screens", [configuration, *options])[0] == [0]
    options = [configuration, f"checkpoint.resume={tmp_path}/first/checkpoints/step-00000004"]
    statuses, screen = run_main(1, tmp_path / "screens", options, Fault("SIGTERM", 9))
    assert statuses == [85] and f"resumed from {tmp_path}/first" in screen
    own = find_checkpoint(tmp_path / "run")
    assert read_meta(own).step in (9, 10)
    assert f"resumed from {own}" in run_main(1, tmp_path / "screens", options)[1]
    assert losses(tmp_path / "run").keys() == set(range(5, 13))
    assert same_weights(tmp_path / "run/checkpoints/step-00000012", tmp_path / "whole/checkpoints/step-00000012")
    whole_run = [configuration, f"run.dir={tmp_path}/other", f"checkpoint.resume={tmp_path}/first"]
    assert f"resumed from {tmp_path}/first/checkpoints/step-00000004" in run(*whole_run), "a run stands for its newest"


def with_records(directory: Path, lineage: str) -> Path:
    """A run directory with the records of a lineage."""
    (directory / "tensorboard").mkdir(parents=True, exist_ok=True)
    (directory / "tensorboard" / "events").write_text(lineage)
    for name in (FILE_NAME, "config.toml", WANDB_FILE):
        (directory / name).write_text(lineage)
    return directory


def files(directory: Path) -> dict[str, str]:
    return {str(path.relative_to(directory)): path.read_text() for path in directory.rglob("*") if path.is_file()}


def take(directory: Path, lineage: Lineage, source: CheckpointMeta | None = None) -> str:
    return take_directory(str(directory), lineage, ALONE, read_lineage(str(directory)), source)


def test_records_of_another_lineage_are_set_aside_and_come_back_with_it(tmp_path: Path):
    run_dir, olds = with_records(tmp_path / "run", "old"), files(tmp_path / "run")
    unnamed = take(run_dir, OLD)
    assert unnamed == f"{run_dir}/superseded/unnamed" and files(Path(unnamed)) == olds
    with_records(run_dir, "old")
    assert take(run_dir, OLD) == "" and read_lineage(str(run_dir)) == {**OLD.record(), "launch": ""}
    assert take(run_dir, MINE) == f"{run_dir}/superseded/old"
    assert files(run_dir / "superseded/old") == olds
    here = {path.name for path in run_dir.iterdir()}
    assert here == {"superseded", "lineage.json", "config.toml"}, "a start may have been given the last"
    with_records(run_dir, "mine")
    assert take(run_dir, OLD) == f"{run_dir}/superseded/mine"
    assert (run_dir / FILE_NAME).read_text() == (run_dir / "tensorboard/events").read_text() == "old"
    assert (run_dir / "superseded/mine" / FILE_NAME).read_text() == "mine"


def test_a_lineage_that_comes_back_again_and_again_brings_all_its_records(tmp_path: Path):
    with_records(tmp_path, "old")
    replace_file(tmp_path / "lineage.json", json.dumps(OLD.record()).encode())
    for number in range(3):
        take(tmp_path, Lineage(f"other-{number}"))
        with_records(tmp_path, f"other-{number}")
        take(tmp_path, OLD)
        assert {text for name, text in files(tmp_path).items() if name in (FILE_NAME, "tensorboard/events")} == {"old"}
        assert not (tmp_path / "superseded/old").exists()
        (tmp_path / "superseded/old").mkdir()  # a copy, left by a kill, of what the lineage had then
        (tmp_path / "superseded/old" / FILE_NAME).write_text("stale")
        take(tmp_path, MINE)
        with_records(tmp_path, "mine")
        take(tmp_path, OLD)
        assert (tmp_path / FILE_NAME).read_text() == "old"
        shutil.rmtree(tmp_path / "superseded")


def test_a_lineage_that_begins_from_a_checkpoint_of_the_one_before_has_its_records_too(tmp_path: Path):
    with_records(tmp_path, "old")
    replace_file(tmp_path / "lineage.json", json.dumps(OLD.record()).encode())
    take(tmp_path, MINE, CheckpointMeta(step=4, tokens=4, extra={"lineage": OLD.record()}))
    assert (tmp_path / FILE_NAME).read_text() == (tmp_path / "tensorboard/events").read_text() == "old"
    assert not (tmp_path / WANDB_FILE).exists() and len(files(tmp_path / "superseded/old")) == 4


def test_a_lineage_that_begins_from_a_checkpoint_of_a_lineage_further_back_has_that_one_s_records(tmp_path: Path):
    for lineage in (OLD, MINE):
        replace_file(with_records(tmp_path, lineage.id) / "lineage.json", json.dumps(lineage.record()).encode())
        take(tmp_path, Lineage("later"))
    take(tmp_path, Lineage("last"), CheckpointMeta(step=4, tokens=4, extra={"lineage": OLD.record()}))
    assert (tmp_path / FILE_NAME).read_text() == (tmp_path / "tensorboard/events").read_text() == "old"
    assert not (tmp_path / WANDB_FILE).exists()


@pytest.mark.parametrize("source", [None, CheckpointMeta(step=4, tokens=4, extra={"lineage": OLD.record()})])
@pytest.mark.parametrize("next_lineage", [OLD, MINE])
def test_a_kill_while_records_are_set_aside_loses_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: CheckpointMeta | None, next_lineage: Lineage
):
    """Killed before any rename, then started again as the old lineage or as another new one."""
    renames, plain = [0], Path.rename
    for deadly in range(1, 6):
        directory = tmp_path / str(deadly)
        with_records(directory, "old")
        replace_file(directory / "lineage.json", json.dumps(OLD.record()).encode())
        renames[0] = 0

        def rename(self: Path, to: Path, deadly: int = deadly) -> Path:
            renames[0] += 1
            if renames[0] == deadly:
                raise KeyboardInterrupt
            return plain(self, to)

        monkeypatch.setattr(Path, "rename", rename)
        with contextlib.suppress(KeyboardInterrupt):
            take(directory, Lineage("third"), source)
        monkeypatch.setattr(Path, "rename", plain)
        take(directory, next_lineage)
        texts = [text for name, text in files(directory).items() if name.endswith((FILE_NAME, "events", WANDB_FILE))]
        assert texts.count("old") >= 3 and set(texts) == {"old"}
        if next_lineage is OLD and renames[0] == deadly:
            assert files(directory).keys() >= {FILE_NAME, "tensorboard/events", WANDB_FILE}, "all is where it was"


def test_records_without_a_lineage_never_take_the_place_of_others(tmp_path: Path):
    for lineage in ("one", "two"):
        (with_records(tmp_path, lineage) / "lineage.json").unlink(missing_ok=True)
        take(tmp_path, MINE)
    assert {(path / FILE_NAME).read_text() for path in (tmp_path / "superseded").iterdir()} == {"one", "two"}


@pytest.mark.slow
def test_a_run_begun_again_keeps_the_records_of_the_one_before(configuration: str, tmp_path: Path):
    log = "log.tensorboard=true"
    run(configuration, log)
    first, whole = (tmp_path / "run" / FILE_NAME).read_bytes(), losses(tmp_path / "run")
    lineage = json.loads((tmp_path / "run/lineage.json").read_text())["id"]
    middle = tmp_path / "run/checkpoints/step-00000008"
    screen = run(configuration, log, f"checkpoint.resume={middle}", "optimizer.adamw.learning_rate=3e-3")
    aside = tmp_path / "run/superseded" / lineage
    assert f"the records of an earlier run in {tmp_path}/run are now in {aside}\n" in screen
    assert (aside / FILE_NAME).read_bytes() == first and list((aside / "tensorboard").iterdir())
    branch = losses(tmp_path / "run")
    assert all((branch[step] == whole[step]) == (step <= 9) for step in range(1, 13)), "one curve, from the first update on"
    board = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    assert [event.step for event in board.Scalars("train/loss")] == list(range(1, 13))
    run(configuration, log, "run.seed=5", "checkpoint.resume=never", "train.steps=6")
    assert losses(tmp_path / "run").keys() == set(range(1, 7)) and len(list(aside.parent.iterdir())) == 2


def test_a_run_begun_from_another_one_s_end_has_a_checkpoint_of_its_own(configuration: str, tmp_path: Path):
    run(configuration, "train.steps=8", f"run.dir={tmp_path}/first")
    run(configuration)
    screen = run(configuration, "train.steps=8", f"checkpoint.resume={tmp_path}/first/checkpoints/step-00000008")
    assert screen.endswith(f"done: {tmp_path}/run has all 8 steps; saved in {tmp_path}/run/checkpoints/step-00000008\n")
    assert find_checkpoint(tmp_path / "run").endswith("step-00000008"), "what is exported is this run's"
    aside = [path.name for path in sorted((tmp_path / "run/checkpoints").glob(".step-*"))]
    assert aside == [".step-00000008.superseded", ".step-00000012.superseded"]
    run(configuration, "train.steps=8", "checkpoint.resume=never")
    aside = [path.name for path in sorted((tmp_path / "run/checkpoints").glob(".step-00000008*"))]
    assert aside == [".step-00000008.superseded", ".step-00000008.superseded-2"], "what was set aside is not destroyed"


REWIND = ["health.spike_sigmas=6", "health.spike_window_steps=16", "health.spike_action=rewind", "checkpoint.every_steps=8"]


def test_a_rewind_takes_no_checkpoint_of_an_earlier_run(configuration: str, tmp_path: Path):
    run(configuration, "train.steps=24", "checkpoint.every_steps=12")
    options = [configuration, *REWIND, "train.steps=24", "run.seed=5", "checkpoint.resume=never"]
    statuses, screen = run_main(1, tmp_path / "screens", options, Fault("spike", 19, rank=None))
    assert statuses == [0], screen
    assert f"{tmp_path}/run/checkpoints holds checkpoints of another run, up to step 24" in screen
    assert [r["step"] for r in read_records(tmp_path / "run" / FILE_NAME) if r["kind"] == "train"] == list(range(1, 25))
    assert run_steps(tmp_path / "run") == [16, 24]
    aside = {path.name[6:14] for path in (tmp_path / "run/checkpoints").glob(".step-*.superseded")}
    assert aside == {"00000012", "00000024"}, "what the earlier run left is set aside, not destroyed"


@pytest.mark.slow
def test_without_a_checkpoint_of_its_own_a_run_ends_at_a_spike(configuration: str, tmp_path: Path):
    run(configuration, "train.steps=12")
    options = [configuration, *REWIND, "train.steps=24", "checkpoint.every_steps=0", "checkpoint.resume=never"]
    statuses, screen = run_main(1, tmp_path / "screens", options, Fault("spike", 19, rank=None))
    assert statuses == [1] and "this run has no checkpoint to go back to; set checkpoint.every_steps" in screen
    assert "step-000000" not in screen.splitlines()[-1], "no checkpoint is named that it cannot use"
    last = [record for record in read_records(tmp_path / "run" / FILE_NAME) if record["kind"] == "health"][-1]
    assert last["action"] == "stop" and last["sentence"] in screen


@pytest.mark.slow
def test_a_run_killed_before_its_first_save_begins_again(configuration: str, tmp_path: Path):
    run(configuration, f"run.dir={tmp_path}/whole")
    run(configuration, "run.seed=5", "log.tensorboard=true")
    with pytest.raises(AssertionError, match="died without a word"):
        run_main(1, tmp_path / "screens", [configuration, "checkpoint.resume=never"], Fault("SIGKILL", 2))
    screen = run(configuration)
    assert "resumed" not in screen and "holds checkpoints of another run" in screen
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


@pytest.mark.slow
def test_damaged_checkpoints_are_passed_over_and_with_no_other_the_start_is_refused(configuration: str, tmp_path: Path):
    run(configuration)
    (tmp_path / "run/checkpoints/step-00000012/manifest.json").write_text("nothing")
    screen = run(configuration)
    assert "step-00000012 is passed over" in screen and "resumed from" in screen
    for step in run_steps(tmp_path / "run"):
        (tmp_path / f"run/checkpoints/step-{step:08d}/manifest.json").write_text("nothing")
    before = snapshot(tmp_path / "run")
    screen = run(configuration, status=2)
    assert "no checkpoint in" in screen and "is intact" in screen and "checkpoint.resume=never" in screen
    assert snapshot(tmp_path / "run") == before


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_refused_start_leaves_the_directory_as_it_was(configuration: str, tmp_path: Path, ranks: int):
    run(configuration, "train.steps=4")
    run(configuration, "train.steps=4", f"run.dir={tmp_path}/other")
    damaged = tmp_path / "other/checkpoints/step-00000004"
    (damaged / "rank-00000.safetensors").write_bytes(b"short")
    before = snapshot(tmp_path)
    for options in (["run.seed=7"], ["model.hidden_size=64"], [f"checkpoint.resume={damaged}"],
                    [f"checkpoint.resume={damaged}", f"run.dir={tmp_path}/new/er"]):  # fmt: skip
        screen = run(configuration, *options, ranks=ranks, status=2, screen=f"{tmp_path}.screen")
        assert screen.startswith("tiglon: ") and screen.count("\n") == 1
        assert snapshot(tmp_path) == before


def snapshot(directory: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(directory.rglob("*"))}


def test_the_second_of_two_runs_changes_nothing_of_the_first(configuration: str, tmp_path: Path):
    run(configuration, "train.steps=4")
    lock = FileLock(tmp_path / "run/checkpoints")
    lock.acquire()
    before = snapshot(tmp_path / "run")
    said = run(configuration, status=2)
    assert f"belongs to a run that is still going (process {os.getpid()}" in said and snapshot(tmp_path / "run") == before
    lock.release()


@pytest.mark.slow
def test_life_json_is_of_the_run_that_trains(configuration: str, tmp_path: Path):
    run(configuration, "train.steps=4")
    first = json.loads((tmp_path / "run/lineage.json").read_text())
    run(configuration, "train.steps=8")
    assert json.loads((tmp_path / "run/lineage.json").read_text())["id"] == first["id"]
    run(configuration, "train.steps=8", "checkpoint.resume=never")
    assert json.loads((tmp_path / "run/lineage.json").read_text())["id"] != first["id"]
    assert read_meta(find_checkpoint(tmp_path / "run")).extra["lineage"]["id"] != first["id"]


@pytest.mark.parametrize(
    "content",
    [
        '{"id": "../../outside"}',
        '{"id": "/etc"}',
        '{"id": 7}',
        "[" * 200_000,
        "[1]",
        '{"id": "a", "launch": 7}',
        '{"id": "a\\u0000"}',
    ],
)
def test_a_strangers_lineage_leads_nowhere(tmp_path: Path, content: str):
    """Else the records would go where it says, and a directory there that holds config.toml alone would be removed."""
    root, outside = tmp_path / "run", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    (outside / "config.toml").write_text("kept")
    (root / "lineage.json").write_text(content)
    (root / FILE_NAME).write_text('{"kind": "train", "step": 1}\n')
    before = read_lineage(str(root))
    assert before is None
    take_directory(str(root), MINE, ALONE, before, None)
    assert [path.name for path in outside.iterdir()] == ["config.toml"]
    assert {path.name for path in tmp_path.iterdir()} == {"run", "outside"}
    source = CheckpointMeta(step=4, tokens=4, extra={"lineage": {"id": "../../outside"}})
    with pytest.raises(ValueError, match="no plain name"):
        take_directory(str(root), MINE, ALONE, MINE.record(), source)
    assert [path.name for path in outside.iterdir()] == ["config.toml"]
