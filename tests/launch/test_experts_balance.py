"""benchmarks/experts_balance.py: what its table says of runs that are made up, and that a finished run is not repeated."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib")  # a GPU machine without network may lack it

from benchmarks import experts_balance
from benchmarks.experts_balance import (
    VARIANTS,
    Place,
    even_from,
    largest_by_chance,
    less,
    measure,
    page,
    plot,
    read_curve,
)
from launch.load_config import load_config


def records(steps: int = 600, experts: bool = True) -> list[dict[str, Any]]:
    """Two layers of four experts: the first even throughout, the second from one expert for all to even half way."""
    made: list[dict[str, Any]] = []
    for step in range(50, steps + 1, 50):
        share = max(0.25, 1 - step / steps)
        made.append({"kind": "train", "step": step, "loss": 8 - step / steps})
        if experts:
            uneven = [share, *[(1 - share) / 3] * 3]
            made += [
                {"kind": "experts", "step": step, "name": f"layer-{n}", "load": load}
                for n, load in enumerate(([0.25] * 4, uneven))
            ]
    return [*made, {"kind": "evaluate", "step": steps, "loss": 7.5}]


def test_a_curve_has_the_largest_load_of_every_step_and_each_expert_at_the_end():
    curve = read_curve(records())
    assert curve["train"][-1] == (600, 7.0) and curve["validation"] == [(600, 7.5)]
    assert curve["largest"][0] == pytest.approx((50, (1 + 4 * 11 / 12) / 2, 4 * 11 / 12))
    assert curve["end"] == {"layer-0": [1.0] * 4, "layer-1": [1.0] * 4}
    dense = read_curve(records(experts=False))
    assert dense["largest"] == [] and dense["end"] == {}


def test_even_from_the_step_after_the_last_uneven_one():
    uneven, even = [(step, 1.0, 4.0) for step in range(1, 4)], [(step, 1.0, 1.0) for step in range(4, 20)]
    assert even_from([*uneven, *even]) == 7, "(4 + 1 + 1 + 1 + 1) / 5 is the first below 2"
    assert even_from([*even, (20, 1.0, 6.0)]) is None and even_from([*even, (20, 1.0, 5.9)]) == 4
    assert even_from(read_curve(records())["largest"]) == 450


def test_chance_alone_is_what_drawing_shows():
    drawn = np.random.default_rng(0).poisson(256, (2000, 16)).max(1).mean() / 256
    assert largest_by_chance(16, 256) == pytest.approx(drawn, abs=0.01)


def test_differences_are_of_the_same_steps_and_of_many_the_running_mean():
    base = [(step, 2.0) for step in range(20)]
    assert less([(10, 1.0), (20, 1.5)], [(10, 1.25), (20, 1.0)]) == ([10, 20], [-0.25, 0.5])
    steps, apart = less([(step, 2.0 + step) for step in range(20)], base)
    assert steps == list(range(4, 20)) and apart == [step - 2.0 for step in steps]


def test_each_variant_differs_from_the_recipe_in_what_it_says(tmp_path: Path):
    place, configs = Place(tmp_path, tmp_path), {}
    for variant in VARIANTS:
        command = place.command(variant, 1, tmp_path / "run")
        configs[variant.name] = load_config(command[4], command[5:]).model
    dense, shipped = configs["dense"], load_config("quickstart-moe").model
    active = (shipped.n_shared_experts + shipped.num_experts_per_tok) * shipped.moe_intermediate_size  # type: ignore[attr-defined]
    assert dense.intermediate_size == active and not dense.layers_with_experts  # type: ignore[attr-defined]
    assert configs["neither"].router_bias is False and configs["neither"].router_aux_loss_coef == 0  # type: ignore[attr-defined]
    assert len({json.dumps(config.model_dump(), sort_keys=True) for config in configs.values()}) == len(VARIANTS)


def test_runs_are_made_once_and_told_on_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made: list[str] = []

    def execute(command: list[str]) -> None:
        directory = Path(next(word for word in command if word.startswith("run.dir=")).partition("=")[2])
        directory.mkdir(parents=True)
        made.append(directory.name)
        lines = (json.dumps(record) + "\n" for record in records(experts="dense" not in directory.name))
        (directory / "metrics.jsonl").write_text("".join(lines))

    monkeypatch.setattr(experts_balance, "execute", execute)
    place = Place(tmp_path, tmp_path / "work")
    results = measure(place, 2, 2)
    assert len(made) == len(set(made)) == 2 * len(VARIANTS)
    assert measure(place, 2, 2) == results and len(made) == 2 * len(VARIANTS)
    table = [line for line in page(results).splitlines() if line.startswith("| neither")]
    assert table == ["| neither | 7.5000 | 7.5000 | 7.5000 | 7.0417 | 1.00 | 1.00 | 1.00 | 450 | 0 and 0 of 8 |"]
    assert any(line.startswith("| dense") and line.endswith("| - | - | - | - | - |") for line in page(results).splitlines())
    plot(results, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
