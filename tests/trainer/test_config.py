"""Values that the sections refuse."""

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from trainer.config import (
    EvaluateConfig,
    ParallelConfig,
    ProfileConfig,
    ScheduleConfig,
    TrainConfig,
)


@pytest.mark.parametrize(
    ("section", "values", "reason"),
    [
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
