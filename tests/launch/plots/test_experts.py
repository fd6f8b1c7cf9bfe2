"""The picture of loads: what it draws is what the records say."""

from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

pytest.importorskip("matplotlib")  # a GPU machine without network may lack it

from launch.plots.experts import ExpertLoads
from launch.plots.figures import svg


def records(layers: int, experts: int, steps: int, seed: int = 0) -> list[dict[str, Any]]:
    """As a run leaves them, of random loads."""
    made, random = [], np.random.default_rng(seed)
    for step in range(1, steps + 1):
        for layer in range(layers):
            load = random.dirichlet(np.ones(experts))
            ends = {"largest": load.max() * experts, "smallest": load.min() * experts}
            made.append({"kind": "experts", "step": 10 * step, "name": f"layer-{layer + 1}", **ends, "load": load.tolist()})
    return made


def test_the_ends_and_the_last_record():
    loads = ExpertLoads.of_records(records(2, 4, 3))
    assert loads is not None and loads.layers == ["layer-1", "layer-2"] and loads.steps == [10, 20, 30]
    shares = np.array([record["load"] for record in records(2, 4, 3)]).reshape(3, 2, 4) * 4
    np.testing.assert_allclose(loads.ends_SL[0], shares.max(-1))
    np.testing.assert_allclose(loads.ends_SL[1], shares.min(-1))
    np.testing.assert_allclose(loads.last_LE, shares[-1])


def test_the_sentence_names_the_ends():
    loads = ExpertLoads.of_records(
        [
            {"step": 1200, "name": "layer-1", "largest": 2.0, "smallest": 0.4, "load": [0.5, 0.25, 0.15, 0.1]},
            {"step": 1200, "name": "layer-3", "largest": 3.6, "smallest": 0.0, "load": [0.09, 0.9, 0.01, 0.0]},
        ]
    )
    assert loads is not None
    assert loads.sentence == (
        "At step 1,200 expert 1 of layer-3 gets 3.60 times an even load, the most, and expert 3 of layer-3 0.00 times, "
        "the least; 2 of 8 get less than a tenth of one."
    )
    even = ExpertLoads.of_records([{"step": 1, "name": "a", "largest": 1.0, "smallest": 1.0, "load": [0.5, 0.5]}])
    assert even is not None and even.sentence.endswith("; none gets less than a tenth.")


def test_a_step_that_lacks_a_layer_is_left_out():
    torn = records(2, 4, 3)[:-1]
    loads = ExpertLoads.of_records(torn)
    assert loads is not None and loads.steps == [10, 20]
    assert ExpertLoads.of_records([]) is None
    torn[3]["load"] = [0.5, 0.5]
    assert ExpertLoads.of_records(torn) is None, "layers of different numbers of experts are no rows of one picture"


@pytest.mark.parametrize(("layers", "experts", "steps"), [(1, 1, 1), (3, 16, 60), (58, 256, 2)])
def test_it_draws_few_layers_by_name_and_many_by_colour(layers: int, experts: int, steps: int):
    loads = ExpertLoads.of_records(records(layers, experts, steps))
    assert loads is not None
    lines, heat, *bars = loads.figure().axes
    assert len(lines.lines) == 2 * layers + 1 and (lines.get_legend() is not None) == (layers <= 8)
    assert len(bars) == (1 if layers <= 8 else 2)
    np.testing.assert_allclose(np.asarray(lines.lines[0].get_ydata()), loads.ends_SL[0][:, 0])
    np.testing.assert_allclose(np.asarray(lines.lines[1].get_ydata()), loads.ends_SL[1][:, 0])
    (image,) = heat.images
    shown = np.asarray(image.get_array())
    low, high = image.get_clim()
    assert low is not None and high is not None and high >= loads.last_LE.max()
    np.testing.assert_allclose(shown, np.maximum(loads.last_LE, low))
    ElementTree.fromstring(svg(loads))
