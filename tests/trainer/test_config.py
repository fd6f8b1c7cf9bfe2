"""Values that the sections refuse."""

from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError
from torch.distributed.pipelining import Schedule1F1B, ScheduleInterleaved1F1B

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
        (ParallelConfig, {"pipeline_parallel_size": 2, "zero_stage": 3}, "cannot be used with zero_stage = 3: it would gather"),
        (ParallelConfig, {"pipeline_parallel_size": 2, "offload": "cpu"}, "cannot be used with offload = 'cpu'"),
        (
            ParallelConfig,
            {"pipeline_stages_per_rank": 2},
            "2 cannot be used with pipeline_schedule = '1f1b', with which a rank has one stage; use pipeline_stages_per_rank=1",
        ),
        (
            ParallelConfig,
            {"pipeline_schedule": "interleaved", "pipeline_stages_per_rank": 1},
            "1 cannot be used with pipeline_schedule = 'interleaved', .* use 2 or more, or pipeline_schedule=1f1b",
        ),
        (ParallelConfig, {"pipeline_stages_per_rank": 0}, "greater than 0"),
        (EvaluateConfig, {"token": 1}, "Extra inputs"),
        (ProfileConfig, {"start_step": -2}, "greater than or equal to -1"),
    ],
)
def test_what_does_not_go_together_is_refused(section: type[BaseModel], values: dict[str, Any], reason: str):
    with pytest.raises(ValidationError, match=reason):
        section(**values)


def test_what_a_pipeline_refuses_one_rank_may_have_and_fold_whatever_the_stage_of_zero():
    ParallelConfig(zero_stage=3, pipeline_schedule="interleaved", pipeline_stages_per_rank=2)
    ParallelConfig(offload="cpu", pipeline_schedule="interleaved")
    ParallelConfig(engine="fold", zero_stage=3, pipeline_parallel_size=2)


def test_a_network_is_cut_into_the_stages_of_all_ranks():
    def stages(**keys: Any) -> int:
        return ParallelConfig(**keys).pipeline_stages

    assert stages() == stages(pipeline_schedule="interleaved", pipeline_stages_per_rank=3) == 1
    assert stages(pipeline_parallel_size=3) == stages(pipeline_parallel_size=3, pipeline_stages_per_rank=1) == 3
    assert stages(pipeline_parallel_size=3, pipeline_schedule="interleaved") == 6
    assert stages(pipeline_parallel_size=3, pipeline_schedule="interleaved", pipeline_stages_per_rank=4) == 12


def torch_takes(kind: str, ranks: int, per_rank: int, micro_batches: int) -> bool:
    """Whether torch makes a schedule of so many stages; of a stage it then asks no more than its place."""
    places = [SimpleNamespace(
        stage_index=ranks * index, num_stages=ranks * per_rank, group_size=ranks, group_rank=0, is_first=index == 0,
        is_last=False, has_backward=False, stage_index_to_group_rank={},
    ) for index in range(per_rank)]  # fmt: skip
    made: Any = Schedule1F1B if kind == "1f1b" else ScheduleInterleaved1F1B
    try:
        made(places[0] if kind == "1f1b" else places, micro_batches, loss_fn=lambda x, _: x)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("kind", ["1f1b", "interleaved"])
def test_a_pipeline_has_micro_batches_that_torch_takes_and_one_for_each_rank_at_least(kind: Any):
    """Interleaved torch takes fewer too, all in one round, which leave ranks without work."""
    for ranks in (2, 3, 4):
        parallel = ParallelConfig(pipeline_parallel_size=ranks, pipeline_schedule=kind)
        got = [count for count in range(1, 21) if parallel.can_schedule(count)]
        per_rank = parallel.pipeline_stages // ranks
        taken = [count for count in range(1, 21) if torch_takes(kind, ranks, per_rank, count)]
        assert got == [count for count in taken if count >= ranks]
        assert taken[0] == (ranks if kind == "1f1b" else 1)
    assert all(ParallelConfig(pipeline_schedule=kind).can_schedule(count) for count in range(1, 21))


def test_a_batch_is_counted_in_target_tokens():
    assert TrainConfig(global_batch_size=3, sequence_length=5).batch_tokens == 15
