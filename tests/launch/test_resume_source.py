"""Whose checkpoints a start resumes from."""

from pathlib import Path
from typing import Any

import pytest

from launch.resume_source import Start, choose_start, normal_path
from launch.runtime import ALONE, World
from trainer.checkpoint.lineage import Lineage
from trainer.config import CheckpointConfig

OLD, MINE = Lineage("old"), Lineage("mine")


FROM_PATH = Lineage("mine", "/elsewhere/step-00000008")


AGAIN = World(rank=0, local_rank=0, world_size=1, local_world_size=1, restarts=1, launched=True)


def chosen(saved: list[Lineage | None], record: Lineage | None = None, world: World = ALONE, **settings: Any) -> Start:
    recorded = None if record is None else {**record.record(), "launch": "job"}
    there = [(step, lineage) for step, lineage in zip(range(100, 0, -1), saved, strict=False)]
    return choose_start(CheckpointConfig(**settings), world, recorded, iter(there))


def test_auto_resumes_the_lineage_of_the_directory():
    assert chosen([MINE, OLD]) == Start(MINE, True)
    assert chosen([OLD, MINE], MINE) == Start(MINE, True), "RUN/lineage.json says whose it is"
    assert chosen([Lineage()]) == Start(Lineage(), True), "of a version without lineages"
    assert chosen([None, MINE]) == Start(MINE, True)


def test_auto_starts_again_where_the_lineage_has_no_checkpoint_yet():
    assert chosen([OLD], MINE) == Start(MINE, False)
    assert chosen([OLD], FROM_PATH) == Start(FROM_PATH, False), "where it began"
    assert not chosen([]).resumes and chosen([]).lineage.id


def test_with_nothing_but_unreadable_checkpoints_auto_does_not_start_anew():
    assert chosen([None]).resumes and chosen([None], MINE).resumes


def test_never_begins_a_lineage_and_its_restarts_resume_it():
    first = chosen([OLD], OLD, resume="never")
    assert not first.resumes and first.lineage.id not in ("", "old")
    assert chosen([MINE, OLD], MINE, AGAIN, resume="never") == Start(MINE, True)
    assert chosen([OLD], MINE, AGAIN, resume="never") == Start(MINE, False)
    same_job = World(0, 0, 1, 1, restarts=0, launched=True, launch="job")
    assert chosen([MINE], MINE, same_job, resume="never") == Start(MINE, True), "a node that was replaced"
    restarted = World(0, 0, 1, 1, restarts=1, launched=True, launch="new job")
    assert chosen([OLD], OLD, restarted, resume="never").lineage.id not in ("", "old"), "it failed before its lineage was noted"


def test_a_path_is_where_the_first_start_begins():
    path = FROM_PATH.source
    first = chosen([OLD], OLD, resume=path)
    assert not first.resumes and first.lineage.source == path and not first.lineage.weights_only
    assert chosen([FROM_PATH, OLD], FROM_PATH, resume=path) == Start(FROM_PATH, True)
    assert chosen([OLD], FROM_PATH, resume=path) == Start(FROM_PATH, False), "killed before its first save"
    assert chosen([FROM_PATH, OLD], None, resume=path) == Start(FROM_PATH, True), "an object store, from another computer"
    assert not chosen([FROM_PATH], FROM_PATH, resume="/elsewhere/step-00000004").resumes
    assert not chosen([FROM_PATH], FROM_PATH, resume=path, reset_optimizer=True).resumes


def test_a_path_is_the_same_however_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert normal_path("run/../run/step-00000008") == normal_path(f"{tmp_path}/run/step-00000008/")
    assert normal_path("s3://bucket/run?region=a") == "s3://bucket/run?region=a"
