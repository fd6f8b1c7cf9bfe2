"""Defaults that depend on the optimizer, and values that the sections refuse."""

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from trainer.config import (
    EvaluateConfig,
    OptimizerConfig,
    ParallelConfig,
    ProfileConfig,
    ScheduleConfig,
    TrainConfig,
)


@pytest.mark.parametrize(
    ("name", "rate", "betas", "decay"),
    [("tiger", 1e-3, (0.965,), 0.01), ("lion", 1e-4, (0.95, 0.98), 0.01), ("adamw", 1e-3, (0.9, 0.95), 0.1)],
)
def test_defaults_follow_the_optimizer(name: Any, rate: float, betas: tuple[float, ...], decay: float):
    default = OptimizerConfig(name=name)
    assert (default.rate, default.coefficients, default.decay, default.clipping) == (rate, betas, decay, 1.0)
    given = OptimizerConfig(name=name, learning_rate=0.5, betas=[0.5] * len(betas), weight_decay=0.0, max_grad_norm=0.0)
    assert (given.rate, given.coefficients, given.decay, given.clipping) == (0.5, (0.5,) * len(betas), 0.0, 0.0)


@pytest.mark.parametrize(
    ("section", "values", "reason"),
    [
        (OptimizerConfig, {"name": "lion", "betas": [0.9]}, "betas of lion are 2 numbers"),
        (OptimizerConfig, {"betas": [1.0]}, r"\[0, 1\)"),
        (OptimizerConfig, {"name": "adamw", "embedding": "lazy"}, "remedy for sign optimizers"),
        (OptimizerConfig, {"name": "lion", "non_finite": "shrink"}, "Tiger's rule"),
        (ScheduleConfig, {"kind": "piecewise"}, "go together"),
        (ParallelConfig, {"sequence_parallel": True}, "tensor_parallel_size > 1"),
        (ParallelConfig, {"zero_hpz_partition_size": 2, "zero_stage": 2}, "belongs to engine = 'zero' with zero_stage = 3"),
        (ParallelConfig, {"engine": "fold", "offload": "cpu"}, "no optimizer state to offload"),
        (EvaluateConfig, {"token": 1}, "Extra inputs"),
        (ProfileConfig, {"start_step": -2}, "greater than or equal to -1"),
    ],
)
def test_what_does_not_go_together_is_refused(section: type[BaseModel], values: dict[str, Any], reason: str):
    with pytest.raises(ValidationError, match=reason):
        section(**values)


def test_a_batch_is_counted_in_target_tokens():
    assert TrainConfig(global_batch_size=3, sequence_length=5).batch_tokens == 15
