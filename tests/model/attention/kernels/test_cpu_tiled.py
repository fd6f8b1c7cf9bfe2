"""Tiles of 64 queries against the definition, around the borders of tiles and windows."""

import pytest

from model.attention.kernels import cpu_tiled
from tests.model.attention.kernels.cases import check_backend, random_inputs


@pytest.mark.parametrize("window", [None, 1, 63, 64, 65, 100])
@pytest.mark.parametrize("S", [63, 64, 130])
@pytest.mark.parametrize("far", [True, False])
def test_tiles_are_the_definition(S, window, far):
    if window is None or window >= S:
        far, window = False, None
    check_backend(cpu_tiled.forward, cpu_tiled.backward, random_inputs(S, far), window)


def test_a_tile_meets_no_key_that_it_cannot_see():
    """Of a window of 10 tokens: queries 64 to 127 see keys from 55 on, and those from 118 on are near for all of them."""
    tiles = list(cpu_tiled._tiles(0, 200, 10, far=False))
    assert [(tile.start, tile.end) for tile in tiles] == [(0, 64), (64, 128), (128, 192), (192, 200)]
    assert (tiles[1].near_start, tiles[1].near_edge, tiles[1].far_end) == (55, 118, 0)
    assert next(tile.far_end for tile in cpu_tiled._tiles(0, 200, 10, far=True)) == 54


def test_tiles_begin_at_the_first_query():
    tiles = list(cpu_tiled._tiles(130, 200, 10, far=True))
    assert [(tile.start, tile.end, tile.near_start, tile.far_end) for tile in tiles] == [
        (130, 194, 121, 184),
        (194, 200, 185, 190),
    ]


@pytest.mark.parametrize("window", [None, 1, 64, 100, 129])
@pytest.mark.parametrize("queries", [1, 63, 65])
@pytest.mark.parametrize("far", [True, False])
def test_tiles_of_the_last_tokens_are_the_definition(queries, window, far):
    inputs = random_inputs(130, far and window is not None, queries=queries)
    check_backend(cpu_tiled.forward, cpu_tiled.backward, inputs, window)
