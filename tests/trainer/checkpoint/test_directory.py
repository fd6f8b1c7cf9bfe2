"""Which checkpoints of a directory are a run's own, and what becomes of the others."""

from pathlib import Path

from tests.trainer.layouts import saved, shards, steps_in, truth
from trainer.checkpoint.api import Checkpoints
from trainer.checkpoint.lineage import Lineage
from trainer.checkpoint.manifest import CheckpointMeta


def test_a_lineage_leaves_the_checkpoints_of_others_alone(tmp_path: Path) -> None:
    def save(checkpoints: Checkpoints, step: int) -> None:
        checkpoints.save(
            shards(truth(step), (0, 1), (0, 1), True),
            CheckpointMeta(step, step, extra={"lineage": checkpoints.lineage.record()}),
        )
        checkpoints.wait()

    first, _ = saved(tmp_path, keep=9)
    first.lineage = Lineage("first")
    for step in (2, 4, 8, 12):
        save(first, step)
    first.close()
    second, _ = saved(tmp_path, keep=1)
    second.lineage = Lineage("second")
    assert second.newest() is None
    save(second, 4)
    assert steps_in(tmp_path) == [2, 4], "what is later or has the same name steps aside"
    assert {path.name for path in tmp_path.glob(".step-*")} == {f".step-{n:08d}.superseded" for n in (4, 8, 12)}
    save(second, 6)
    assert steps_in(tmp_path) == [2, 6] and second.newest() == str(tmp_path / "step-00000006"), "only its own are pruned"
    second.close()


def test_pruning_keeps_the_newest_and_the_milestones(tmp_path: Path) -> None:
    checkpoints, _ = saved(tmp_path, *range(10, 80, 10), keep=2, keep_every_steps=30)
    assert steps_in(tmp_path) == [30, 60, 70]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".step")] == []
    checkpoints.close()


def test_going_back_sets_the_later_checkpoints_aside(tmp_path: Path) -> None:
    checkpoints, reports = saved(tmp_path, 10, 20, 30, keep=3)
    checkpoints.save(shards(truth(15), (0, 1), (0, 1), True), CheckpointMeta(15, 150))
    checkpoints.wait()
    assert steps_in(tmp_path) == [10, 15]
    assert "checkpoint of step 30 set aside: this run went back to before it" in reports
    assert (tmp_path / ".step-00000030.superseded" / "manifest.json").exists()
    checkpoints.close()


def test_what_a_crash_left_is_cleared_or_brought_back(tmp_path: Path) -> None:
    saved(tmp_path, 10, 20)[0].close()
    (tmp_path / "step-00000020").rename(tmp_path / ".step-00000020.replaced")  # killed between two renames
    for name in (".step-00000030.partial", ".step-00000005.removed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rank-00000.safetensors").write_bytes(b"half")
    checkpoints, _ = saved(tmp_path)
    assert (tmp_path / ".step-00000030.partial").exists(), "a start that is refused yet has changed nothing"
    checkpoints.begin()
    assert [path.name for path in sorted(tmp_path.iterdir())] == [".lock", "step-00000010", "step-00000020"]
    assert checkpoints.newest() == str(tmp_path / "step-00000020")
    checkpoints.close()
