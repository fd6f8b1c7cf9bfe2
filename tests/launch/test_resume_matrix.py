"""A subset of the resume matrix; the whole of it is `python -m benchmarks.resume_matrix`."""

from pathlib import Path

import pytest

from launch.checkpoints import tensor_names
from tests.launch.resume import (
    SAVED,
    Cell,
    by_world,
    deep,
    largest_difference,
    mixtures,
    read_cells,
    staged,
    write_cells,
)
from tests.ranks import run_ranks

CHOSEN = [
    Cell(2, 2, "zero1", "tiger"),
    Cell(1, 2, "zero3", "tiger"),
    Cell(2, 1, "fold", "tiger"),
    Cell(1, 2, "zero2", "lion"),
    Cell(1, 1, "zero3", "lion", 2),
    Cell(2, 1, "zero3", "lion"),
    Cell(2, 1, "zero2", "adamw"),
    Cell(1, 2, "zero3", "adamw"),
    Cell(1, 1, "zero2", "adamw", 2, "heads"),
    Cell(1, 2, "fold", "muon"),
    Cell(2, 1, "zero1", "muon"),
]


def test_any_layout_resumes_from_any_other_on_the_same_curve(tmp_path: Path) -> None:
    worlds = by_world(CHOSEN)
    unbroken: dict[str, list[float]] = {}
    for size, chosen in worlds.items():
        unbroken |= run_ranks(write_cells, size, str(tmp_path), chosen)[0]
    control = run_ranks(read_cells, 2, str(tmp_path), CHOSEN[3:4], CHOSEN[3:4], True)[0]
    off = largest_difference(control[str(CHOSEN[3]), str(CHOSEN[3])], unbroken[str(CHOSEN[3])])
    assert off > 1e-4, "the losses do not show a lost momentum"
    resumed: dict[tuple[str, str], list[float]] = {}
    for size, chosen in worlds.items():
        resumed |= run_ranks(read_cells, size, str(tmp_path), chosen, CHOSEN)[0]
    assert len(resumed) == 3 * 3 + 3 * 3 + 3 * 3 + 2 * 2
    for (reader, writer), losses in resumed.items():
        if reader == writer:
            assert losses == unbroken[writer], f"{writer} does not continue bit for bit"
        assert largest_difference(losses, unbroken[writer]) < 1e-5, f"{writer} read by {reader}: {losses}, {unbroken[writer]}"


def exchange(folder: Path, cells: list[Cell], axis: str = "pipeline") -> None:
    """Save every cell; load each in every one of its optimizer that has several ranks on the axis, and those in every cell."""
    unbroken: dict[str, list[float]] = {}
    for size, chosen in by_world(cells).items():
        unbroken |= run_ranks(write_cells, size, str(folder), chosen, timeout_seconds=240)[0]
    pipelines, others = ([cell for cell in cells if (getattr(cell, axis) > 1) == split] for split in (True, False))
    resumed: dict[tuple[str, str], list[float]] = {}
    for readers, writers in ((pipelines, cells), (others, pipelines)):
        for size, chosen in by_world(readers).items():
            resumed |= run_ranks(read_cells, size, str(folder), chosen, writers, timeout_seconds=240)[0]
    pairs = {
        (str(r), str(w))
        for r in cells
        for w in cells
        if r.optimizer == w.optimizer and max(getattr(r, axis), getattr(w, axis)) > 1
    }
    assert resumed.keys() == pairs
    for optimizer in {cell.optimizer for cell in cells}:
        written = [tensor_names(folder / f"{cell}/step-{SAVED:08d}") for cell in cells if cell.optimizer == optimizer]
        assert all(names == written[0] for names in written), "a checkpoint tells of the layout that wrote it"
    for (reader, writer), losses in resumed.items():
        if reader == writer:
            assert losses == unbroken[writer], f"{writer} does not continue bit for bit"
        off = largest_difference(losses, unbroken[writer])
        assert off < 1e-5, f"{writer} read by {reader}: {off:.1e}, {losses}, {unbroken[writer]}"


def test_a_pipeline_and_one_process_resume_from_each_other(tmp_path: Path) -> None:
    exchange(tmp_path, [deep("adamw", "zero1"), deep("adamw", "zero1", pipeline=2, schedule="interleaved")])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_pipelines_resume_from_every_layout_and_every_layout_from_them(tmp_path: Path) -> None:
    exchange(tmp_path, staged())


def test_experts_of_two_ranks_and_of_one_resume_from_each_other(tmp_path: Path) -> None:
    exchange(tmp_path, mixtures()[:3:2], "experts")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_layouts_of_experts_resume_from_every_layout_and_every_layout_from_them(tmp_path: Path) -> None:
    exchange(tmp_path, mixtures(), "experts")
