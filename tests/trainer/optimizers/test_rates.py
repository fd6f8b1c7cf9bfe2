"""Rates and decays of parameters: relative to a statistic with a floor, per row, and all together as each alone."""

import pytest
import torch

from model.parallel.mesh import Mesh
from model.parameters import ParameterSpec
from tests.trainer.rules import SEEN, optimizer
from trainer.optimizers.fragments import FragmentBlock, fragment_of
from trainer.optimizers.rates import Rates, UpdateStep, rate_in, zero_where
from trainer.optimizers.step import Optimizer

SPECS = {
    "embed": ParameterSpec("embedding", (4, 2), None), "small": ParameterSpec("matrix", (2, 3), None),
    "gain": ParameterSpec("gain", (3,), None),
}  # fmt: skip
FLOORS = {"embed": 0.1, "small": 0.5, "gain": 9.0}


def rates(step: UpdateStep, **chosen: object) -> tuple[Rates, Optimizer]:
    fragments = [
        fragment_of(name, spec, Mesh(), 0, torch.full((spec.shape[0] * (spec.shape[1] if len(spec.shape) > 1 else 1),), 0.25))
        for name, spec in SPECS.items()
    ]
    moves = Optimizer(optimizer(**chosen), fragments, Mesh(), FLOORS, partitioned=False)
    return moves.rates(step, moves.measure()), moves


def test_tigers_rate_follows_the_rms_down_to_the_floor() -> None:
    found, moves = rates(UpdateStep(1, 1e-2))
    embed, small, gain = (found.of(fragment) for fragment in moves.fragments)
    assert embed == (pytest.approx(1e-2 * 0.25), 0.01) and small == (pytest.approx(1e-2 * 0.5), 0.01)
    assert gain == (pytest.approx(0.5e-2), 0.0)
    together, decays = found.together(moves.fragments)
    torch.testing.assert_close(together, torch.tensor([2.5e-3, 5e-3, 5e-3]))
    assert decays == [0.01, 0.01, 0.0]


def test_rows_not_seen_have_a_rate_of_zero() -> None:
    seen = torch.tensor([True, False, False, True])
    found, moves = rates(UpdateStep(1, 1e-2, seen), rules=SEEN, embedding_rms="row")
    embed = moves.fragments[0]
    rate, _ = found.of(embed)
    torch.testing.assert_close(rate, 2.5e-3 * seen.double())
    assert [found.by_row(fragment) for fragment in moves.fragments] == [True, False, False]
    assert rate_in(FragmentBlock(2, 6, 1, 2, 0), rate, torch.float32).tolist() == [[0.0], [0.0]]


def test_another_rules_rate_follows_the_schedule_of_the_one_that_is_named() -> None:
    found, moves = rates(UpdateStep(1, 0.5e-3), rules={"embedding": {"rule": "adamw", "learning_rate": 4e-3}})
    assert found.of(moves.fragments[0]) == (pytest.approx(2e-3), 0.1)  # half of its peak, as 0.5e-3 is half of 1e-3


def test_a_bad_step_has_a_rate_of_zero_where_only_the_device_knows() -> None:
    assert zero_where(torch.tensor(True), 0.5).item() == 0.0 and zero_where(True, 0.5) == 0.5
