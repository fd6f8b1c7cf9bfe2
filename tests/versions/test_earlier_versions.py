"""What earlier versions wrote is read by this one (README.md beside this file)."""

import os
import shutil
from pathlib import Path

import pytest

from data.corpus.audit import audit_corpus
from launch.train import main
from tests.ranks import run_ranks
from trainer.monitoring.records import read_records

HERE = Path(__file__).parent
VERSIONS = sorted(path.name for path in HERE.iterdir() if path.name[0].isdigit())
RUNS = sorted(path.parent.relative_to(HERE).as_posix() for path in HERE.glob("*/*/metrics.jsonl"))
MIDDLE, END = 6, 12
"""Steps: of the checkpoint, of the run."""


def resume(rank: int, world_size: int, directory: str, configuration: str, screen: str) -> int:
    os.dup2(os.open(screen, os.O_WRONLY | os.O_CREAT), 2)
    os.chdir(directory)
    return main([configuration])


def losses(run: Path) -> dict[tuple[str, int], float]:
    return {
        (record["kind"], record["step"]): record["loss"] for record in read_records(run / "metrics.jsonl") if "loss" in record
    }


@pytest.mark.parametrize("run", RUNS)
def test_a_run_resumes_from_its_middle_and_follows_the_unbroken_one(run: str, tmp_path: Path):
    """Within the rounding of its precision: another order of sums is allowed, another rate or a lost momentum is not."""
    version, name = run.split("/")
    shutil.copytree(HERE / version, tmp_path / version)
    unbroken = losses(HERE / run)
    screen = tmp_path / "screen"
    status = run_ranks(resume, 1, str(tmp_path / version), f"{name}/config.toml", str(screen), grouped=False)
    assert status == [0], screen.read_text()
    assert f"resumed from {name}/checkpoints/step-{MIDDLE:08d}" in screen.read_text().replace(f"{tmp_path / version}/", "")
    found, relative = losses(tmp_path / run), 1e-3 if name == "fold" else 1e-5
    assert found.keys() == unbroken.keys() and ("train", END) in found
    assert found == pytest.approx(unbroken, rel=relative)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("part", ["train", "validation"])
def test_a_corpus_is_read_and_audited(version: str, part: str):
    report = audit_corpus(str(HERE / version / "corpus" / part))
    assert not report.faults and report.manifest.counts["part_tokens"] > 300
