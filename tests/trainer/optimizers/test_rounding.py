"""Stochastic rounding: exact mean, bits that depend on the counter and the place alone."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from trainer.optimizers import rounding

CPU = torch.device("cpu")
KEY = rounding.noise_key(1, 2, "model.norm.weight", "values")


def rounded(source: torch.Tensor, key: rounding.NoiseKey, row: int = 0, column: int = 0) -> torch.Tensor:
    target = torch.empty(source.shape, dtype=torch.bfloat16)
    rounding.slice_noise(key, rounding.SliceBounds(row, column, *source.shape), CPU).round_(target, source.clone(), 0, 0)
    return target


def noise(key: rounding.NoiseKey) -> torch.Tensor:
    return rounding.slice_noise(key, rounding.SliceBounds(0, 0, 1024, 1024), CPU).noise(0, 0, 1024, 1024)


def test_bfloat16_numbers_stay() -> None:
    exact = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(rounded(exact.float(), KEY), exact)


def test_the_mean_is_exact_and_only_neighbours_occur() -> None:
    for value in (1.0 + 2**-10, 0.020001, -3.3e-5, 1e-30):
        source = torch.full((512, 512), value)
        result = rounded(source, KEY).double()
        low, high = result.min(), result.max()
        assert result.unique().numel() == 2 and low < value < high
        deviation = (high - low) / 2 / 512
        assert abs(result.mean() - value) < 5 * deviation


def test_draws_are_even_and_independent_of_their_neighbours() -> None:
    draws = noise(KEY).double() / 65536 - 0.5
    assert abs(draws.var() * 12 - 1) < 0.01
    later = noise(rounding.noise_key(1, 3, "model.norm.weight", "values"))
    for other in (draws.roll(1, 0), draws.roll(1, 1), draws.roll(7, 1), later.double() / 65536 - 0.5):
        assert abs((draws * other).mean() * 12) < 5e-3
    rows = draws.mean(1) * (12 * 1024) ** 0.5
    columns = draws.mean(0) * (12 * 1024) ** 0.5
    assert 0.7 < rows.std() < 1.3 and 0.7 < columns.std() < 1.3


@settings(max_examples=50, deadline=None)
@given(row=some.integers(0, 60), column=some.integers(0, 60), rows=some.integers(1, 4), columns=some.integers(1, 4))
def test_a_slice_draws_what_the_whole_draws_there(row: int, column: int, rows: int, columns: int) -> None:
    whole = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    part = whole[row : row + rows, column : column + columns].contiguous()
    wanted = rounded(whole, KEY)[row : row + rows, column : column + columns]
    assert torch.equal(rounded(part, KEY, row, column), wanted)
    target = torch.empty(part.shape, dtype=torch.bfloat16)
    rounding.slice_noise(KEY, rounding.SliceBounds(0, 0, 64, 64), CPU).round_(target, part.clone(), row, column)
    assert torch.equal(target, wanted)


def test_draws_are_those_of_every_version() -> None:
    """A run that is resumed by a later version continues with the same bits."""
    drawn = rounding.slice_noise(KEY, rounding.SliceBounds(70_000, 90_000, 3, 5), CPU).noise(0, 0, 3, 5).tolist()
    assert drawn == [
        [25151, 62728, 57321, 8397, 53966], [47500, 31114, 52609, 6134, 17995], [52358, 25934, 48985, 24177, 11126],
    ]  # fmt: skip


def test_keys_differ_by_everything_they_are_made_of() -> None:
    made = {rounding.noise_key(*parts) for parts in [(1, 2, "a"), (2, 1, "a"), (1, 2, "b"), (1, 2, "a", 0), (1, 2, "a", 1)]}
    assert len(made) == 5
    assert rounding.noise_key(1, 2, "a") == rounding.noise_key(1, 2, "a")


def test_small_steps_add_up() -> None:
    """A thousand steps of a hundredth of a bfloat16 spacing: nearest stays, stochastic arrives."""
    near = torch.ones(32, 32, dtype=torch.bfloat16)
    drawn = near.clone()
    for step in range(1000):
        near.copy_(near.float() + 2**-7 / 100)
        drawn = rounded(drawn.float() + 2**-7 / 100, rounding.noise_key(0, step))
    assert torch.equal(near, torch.ones_like(near))
    assert abs(drawn.float().mean() - (1 + 1000 * 2**-7 / 100)) < 3e-3
