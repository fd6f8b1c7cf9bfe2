"""Fragments and the rectangles that they are cut into."""

import pytest
import torch

from model.parallel.mesh import Axis, Mesh
from model.parameters import ONES, ZERO_CENTERED, Normal, ParameterSpec
from tests.trainer.tiny import VOCABULARY, WIDTH, Tiny
from trainer.optimizers.fragments import flat_blocks, fragment_blocks, fragment_of, view, whole_fragments


@pytest.mark.parametrize(
    ("offset", "count", "width", "limit"), [(3, 40, 7, 1000), (0, 64, 8, 20), (5, 3, 10, 2), (9, 90, 10, 4), (0, 0, 3, 5)]
)
def test_blocks_are_rectangles_that_cover(offset: int, count: int, width: int, limit: int) -> None:
    position = 0
    for block in fragment_blocks(offset, count, width, limit):
        assert block.start == position and 0 < block.stop - block.start <= limit
        assert divmod(offset + block.start, width) == (block.row, block.column)
        columns, rest = divmod(block.stop - block.start, block.rows)
        assert rest == 0 and block.column + columns <= width and (block.rows == 1 or columns == width)
        position = block.stop
    assert position == count


def test_a_fragment_of_a_tensor_parallel_rank_knows_where_it_lies() -> None:
    mesh = Mesh(tensor=Axis(2, 1))
    columns = fragment_of("w", ParameterSpec("matrix", (4, 6), 1), mesh, 3, torch.arange(5.0))
    assert (columns.shape, columns.slice_shape, columns.slice_start) == ((4, 6), (4, 3), (0, 3))
    assert columns.width == 3 and not columns.replicated
    gain = fragment_of("g", ParameterSpec("gain", (6,), None), mesh, 0, torch.ones(6))
    assert gain.replicated and gain.width == 6 and gain.slice_start == (0,)


def test_whole_fragments_are_views_of_the_weights_and_a_tied_one_appears_once() -> None:
    for tied, names in ((True, ["embed", "matrix", "gain"]), (False, ["embed", "matrix", "gain", "head"])):
        model = Tiny(tied, torch.float32)
        fragments = whole_fragments(dict(model.named_parameters()), Mesh())
        assert [fragment.name for fragment in fragments] == names
        fragments[0].values.fill_(3.0)
        assert torch.equal(model.embed.data, torch.full((VOCABULARY, WIDTH), 3.0))


def test_states_are_zeros_per_element_per_row_of_the_slice_and_per_tensor() -> None:
    fragment = fragment_of("w", ParameterSpec("matrix", (2, 2), None), Mesh(), 1, torch.ones(3, dtype=torch.bfloat16))
    fragment.allocate({"momentum": "element", "by_row": "row", "one": "matrix"})
    shapes = {name: (tuple(state.shape), state.dtype) for name, state in fragment.state.items()}
    assert shapes == {"momentum": ((3,), torch.bfloat16), "by_row": ((2,), torch.float32), "one": ((), torch.float32)}
    assert not any(state.any() for state in fragment.state.values())
    cuts = list(fragment_blocks(1, 3, fragment.width, 100))
    blocks = [view(fragment, cut) for cut in cuts]
    assert [tuple(block.values.shape) for block in blocks] == [(1, 1), (1, 2)]
    assert [tuple(block.state["by_row"].shape) for block in blocks] == [(1, 1), (1, 1)]
    blocks[1].state["by_row"].fill_(2.0)
    assert fragment.state["by_row"].tolist() == [0.0, 2.0] and blocks[0].state["one"].ndim == 0


def test_flat_blocks_are_single_rows() -> None:
    assert [(cut.start, cut.stop, cut.rows) for cut in flat_blocks(5, 2)] == [(0, 2, 1), (2, 4, 1), (4, 5, 1)]


def test_the_centre_is_that_of_the_initial_values() -> None:
    """Towards 1 a step with `non_finite = "shrink"` would double a gain that stands for 1 + w."""
    mesh = Mesh()
    for initial, centre in ((ONES, 1.0), (ZERO_CENTERED, 0.0), (Normal(0.5), 0.0)):
        assert fragment_of("g", ParameterSpec("gain", (6,), None, initial), mesh, 0, torch.ones(6)).centre == centre


@pytest.mark.parametrize("limit", [3, 7, 1000])
@pytest.mark.parametrize(("offset", "count"), [(0, 12), (2, 9), (5, 1), (7, 0)])
def test_each_element_meets_the_factor_of_its_row(offset: int, count: int, limit: int) -> None:
    """Of the second of two tensor-parallel ranks, whose part begins in the middle of a row."""
    mesh, factor_R = Mesh(tensor=Axis(2, 1)), torch.arange(8.0)
    matrix = fragment_of("w", ParameterSpec("matrix", (8, 3), 0), mesh, offset, torch.ones(count))
    for cut in fragment_blocks(offset, count, matrix.width, limit):
        cut.of(matrix.values).mul_(matrix.factors_in(cut, factor_R))
    assert matrix.values.tolist() == [4 + (offset + index) // 3 for index in range(count)]
    length = min(count, 4 - min(offset, 4))
    bias = fragment_of("b", ParameterSpec("bias", (8,), 0), mesh, offset, torch.ones(length))
    for cut in fragment_blocks(offset, length, bias.width, limit):
        cut.of(bias.values).mul_(bias.factors_in(cut, factor_R))
    assert bias.values.tolist() == [4 + offset + index for index in range(length)]
