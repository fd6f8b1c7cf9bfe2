"""What is known of long contexts before they are evaluated."""

import pytest

from launch.load_config import load_config
from launch.long_contexts import check_contexts_alone, check_contexts_of_run, row_cache_bytes


def config(configuration: str, *overrides: str):
    base = ("evaluate.contexts=[1000000,100]", "evaluate.chunk_tokens=1000", "model.num_key_value_heads=2", "model.head_dim=16")
    return load_config(configuration, [*base, *overrides])


def test_bytes_per_token(configuration: str):
    """Two layers; GQA keys and values of 2 heads of 16; all chunks but the last."""
    plain = config(configuration, "model.num_hidden_layers=2")
    assert row_cache_bytes(plain, plain.position, 1_000_000) == 2 * 999_000 * (2 * 2 * 16) * 4
    assert row_cache_bytes(plain, plain.position, 1000) == 0, "one chunk: nothing is kept"
    assert row_cache_bytes(plain, plain.position, 1001) == 2 * 1000 * 64 * 4
    split = config(
        configuration, "model.num_hidden_layers=2", "parallel.tensor_parallel_size=2", "parallel.context_parallel_size=4",
        "train.precision=bf16",
    )  # fmt: skip
    assert row_cache_bytes(split, split.position, 1_000_000) == 2 * 250_000 * 32 * 2
    windowed = config(configuration, "model.num_hidden_layers=2", "model.sliding_window=8", "model.full_attention_layers=[1]")
    assert row_cache_bytes(windowed, windowed.position, 1_000_000) == (999_000 + 7) * 64 * 4
    staged = config(configuration, "model.num_hidden_layers=5", "parallel.pipeline_parallel_size=2")
    assert row_cache_bytes(staged, staged.position, 1_000_000) == 3 * 999_000 * 64 * 4
    unlimited = config(configuration, "evaluate.chunk_tokens=0")
    assert row_cache_bytes(unlimited, unlimited.position, 1_000_000) == 0


def test_a_cache_that_cannot_fit_is_refused(configuration: str):
    plain = config(configuration, "model.num_hidden_layers=2")
    check_contexts_of_run(plain, 512e6)
    with pytest.raises(
        ValueError, match=r"^evaluate.contexts: keys and values of a context of 1,000,000 tokens take 511 MB of"
    ):
        check_contexts_of_run(plain, 511e6)
    shared = config(configuration, "model.num_hidden_layers=2", "parallel.context_parallel_size=4")
    check_contexts_of_run(shared, 129e6)
    check_contexts_alone(shared, [100, 1000], shared.position, 1.0)
    with pytest.raises(ValueError, match=r"^contexts: .* which has 511 MB; leave it out, or measure it in a run"):
        check_contexts_alone(shared, [100, 1_000_000], shared.position, 511e6)
