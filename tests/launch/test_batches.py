import pytest

from launch.batches import grid_of, micro_batches
from launch.config import RunConfig
from launch.load_config import build_config


def test_micro_batches_follow_from_the_world():
    config = build_config({}, ["train.global_batch_size=32", "train.micro_batch_size=4", "parallel.tensor_parallel_size=2"])
    assert [micro_batches(config, world) for world in (2, 4, 8, 16)] == [8, 4, 2, 1]
    with pytest.raises(ValueError, match=r"3 ranks cannot form groups of parallel.tensor_parallel_size = 2"):
        micro_batches(config, 3)
    with pytest.raises(ValueError, match=r"a run has at least 1 rank, got 0; give --nproc 1 or more"):
        micro_batches(config, 0)
    with pytest.raises(ValueError, match=r"is not a multiple of train.micro_batch_size = 4 times 16 data-parallel ranks"):
        micro_batches(config, 32)
    shared = build_config({}, ["train.global_batch_size=32", "train.micro_batch_size=4", "parallel.context_parallel_size=2"])
    assert [micro_batches(shared, world) for world in (2, 4, 16)] == [8, 4, 1]
    both = build_config({}, ["parallel.tensor_parallel_size=2", "parallel.context_parallel_size=4"])
    with pytest.raises(ValueError, match=r"12 ranks cannot form groups of parallel.tensor_parallel_size = 2 x parallel"):
        micro_batches(both, 12)


def test_ranks_that_split_experts_divide_those_that_share_the_other_weights():
    keys = ("parallel.expert_parallel_size=4", "model.feed_forward=moe", "train.global_batch_size=48")
    config = build_config({}, [*keys, "train.micro_batch_size=4", "parallel.tensor_parallel_size=2"])
    assert micro_batches(config, 8) == 3
    with pytest.raises(ValueError, match=r"expert_parallel_size = 4 does not divide the 2 ranks that have the same weights"):
        micro_batches(config, 4)


def pipelined(ranks: int, *overrides: str) -> RunConfig:
    keys = (f"parallel.pipeline_parallel_size={ranks}", "parallel.engine=zero", "model.num_hidden_layers=8")
    return build_config({}, ["train.micro_batch_size=2", *keys, *overrides])


def refusal(config: RunConfig, world_size: int) -> str:
    with pytest.raises(ValueError) as caught:
        micro_batches(config, world_size)
    return str(caught.value)


def test_stages_share_the_micro_batches_of_a_data_parallel_rank():
    config = pipelined(2, "train.global_batch_size=32")
    assert [micro_batches(config, world) for world in (2, 4, 8, 16)] == [16, 8, 4, 2]
    with pytest.raises(ValueError, match=r"3 ranks cannot form groups of .+ x parallel.pipeline_parallel_size = 2"):
        micro_batches(config, 3)
    both = pipelined(2, "train.global_batch_size=32", "parallel.tensor_parallel_size=2", "parallel.context_parallel_size=2")
    assert micro_batches(both, 16) == 8 and grid_of(both.parallel, 16).shape == (2, 2, 2, 2)


def test_fewer_micro_batches_than_ranks_are_refused_with_those_that_fit():
    assert refusal(pipelined(4, "train.global_batch_size=12"), 8) == (
        "an update of 12 sequences is 3 micro-batches per rank, with which parallel.pipeline_schedule = '1f1b' of 4 ranks "
        "cannot run; use 4 (16 sequences), or another train.micro_batch_size"
    )
    assert micro_batches(pipelined(4, "train.global_batch_size=16"), 8) == 4
    assert refusal(pipelined(2, "train.global_batch_size=2"), 2).startswith(
        "an update of 2 sequences is 1 micro-batch per rank, with which"
    )


def test_interleaved_rounds_that_differ_are_refused_with_what_fits_below_and_above():
    interleaved = "parallel.pipeline_schedule=interleaved"
    assert refusal(pipelined(2, interleaved, "train.global_batch_size=14"), 2) == (
        "an update of 14 sequences is 7 micro-batches per rank, with which parallel.pipeline_schedule = 'interleaved' of 2 "
        "ranks cannot run; use 6 (12 sequences) or 8 (16 sequences), or another train.micro_batch_size"
    )
    assert refusal(pipelined(4, interleaved, "train.global_batch_size=22"), 4) == (
        "an update of 22 sequences is 11 micro-batches per rank, with which parallel.pipeline_schedule = 'interleaved' of 4 "
        "ranks cannot run; use 10 (20 sequences) or 12 (24 sequences), or another train.micro_batch_size"
    )
    assert micro_batches(pipelined(4, interleaved, "train.global_batch_size=20"), 4) == 10


def test_a_ramp_is_refused_for_a_size_in_its_middle():
    ramp = pipelined(2, "train.global_batch_size=32", "train.batch_ramp=[[5,8],[9,2]]")
    assert refusal(ramp, 2) == (
        "an update of 2 sequences in train.batch_ramp is 1 micro-batch per rank, with which parallel.pipeline_schedule = "
        "'1f1b' of 2 ranks cannot run; use 2 (4 sequences), or another train.micro_batch_size"
    )
