"""Records of loads, computed here by hand, and beside the file of a run that goes back."""

from pathlib import Path

import pytest
import torch

from data.storage import replace_file
from trainer.monitoring.config import LogConfig
from trainer.monitoring.expert_loads import load_records, load_summary
from trainer.monitoring.metrics import Metrics
from trainer.monitoring.records import FILE_NAME, read_records, scalars
from trainer.optimizers.expert_balance import StepLoads

LOADS = StepLoads((1, 3), torch.tensor([[3.0, 1.0, 4.0, 0.0], [2.0, 2.0, 2.0, 2.0]]))
"""Of two layers and four experts, 8 choices each."""


def test_shares_by_layer_and_the_ends_of_them():
    first, second = load_records(LOADS, 7)
    assert first == {
        "kind": "experts", "step": 7, "name": "layer-1", "largest": 2.0, "smallest": 0.0, "load": [0.375, 0.125, 0.5, 0.0],
    }  # fmt: skip
    assert (second["name"], second["largest"], second["smallest"], second["load"]) == ("layer-3", 1.0, 1.0, [0.25] * 4)
    assert float(load_summary(LOADS)["expert_load_max"]) == 2.0


def test_shares_of_many_choices_sum_to_one():
    tokens = torch.randint(0, 1 << 20, (3, 256)).float()
    for row, record in zip(tokens.double(), load_records(StepLoads((0, 1, 2), tokens), 1), strict=True):
        assert sum(record["load"]) == pytest.approx(1.0, abs=256e-6)
        assert record["largest"] == pytest.approx(float(256 * row.max() / row.sum()), rel=1e-12)
        assert record["smallest"] == pytest.approx(float(256 * row.min() / row.sum()), rel=1e-12)


def test_layers_without_a_choice_and_networks_without_experts():
    assert load_records(StepLoads(), 1) == [] and load_summary(StepLoads()) == {}
    (record,) = load_records(StepLoads((2,), torch.zeros(1, 4)), 1)
    assert record["load"] == [0.0] * 4 and record["largest"] == 0.0


def test_curves_are_the_ends_by_layer():
    assert scalars(load_records(LOADS, 7)[0]) == {"experts/layer-1/largest": 2.0, "experts/layer-1/smallest": 0.0}


def test_a_run_that_goes_back_drops_the_later_ones(tmp_path: Path):
    metrics = Metrics(replace_file, tmp_path, LogConfig(tensorboard=False), {})
    for step in (10, 20, 30):
        for record in load_records(LOADS, step):
            metrics.record(record)
    metrics.truncate(20)
    metrics.close()
    assert [record["step"] for record in read_records(tmp_path / FILE_NAME)] == [10, 10, 20, 20]
    metrics = Metrics(replace_file, tmp_path, LogConfig(tensorboard=False), {}, from_step=10)
    metrics.close()
    assert read_records(tmp_path / FILE_NAME) == load_records(LOADS, 10) == metrics.last
