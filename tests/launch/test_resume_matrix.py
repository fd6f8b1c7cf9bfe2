"""A subset of the resume matrix; the whole of it is `python -m benchmarks.resume_matrix`."""

from pathlib import Path

from tests.launch.resume import Cell, by_world, largest_difference, read_cells, write_cells
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
    worlds = {size: chosen for size, chosen in by_world(CHOSEN).items() if chosen}
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
