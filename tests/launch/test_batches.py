import pytest

from launch.batches import micro_batches
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
