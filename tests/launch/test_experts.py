"""benchmarks/experts.py: contestants that compute the same, what its table and page say of figures that are made up, memory."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("matplotlib")  # a GPU machine without network may lack it

from benchmarks import experts
from benchmarks.experts import NAMES, UPDATED, check, layer, network, page, peak, table, write

CPU = torch.device("cpu")
SMALL = {"HIDDEN": 32, "JOINT": 128, "PASSED": 64, "LENGTH": 8}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that take no time."""
    for name, value in SMALL.items():
        monkeypatch.setattr(experts, name, value)
    sizes = {"vocab_size": 64, "hidden_size": SMALL["HIDDEN"], "intermediate_size": SMALL["PASSED"], "num_hidden_layers": 2}
    monkeypatch.setattr(experts, "SIZES", experts.SIZES | sizes)


@pytest.mark.usefixtures("small")
def test_layers_compute_the_same_and_one_that_does_not_is_refused():
    found = {name: layer(name, 8, CPU, torch.float32) for name in NAMES}
    check(found)
    assert not torch.allclose(found["dense"](), found["tiglon"]())
    right = found["transformers, eager"]
    with pytest.raises(RuntimeError, match=r"transformers, eager computes another layer: off by 1\.0e-04"):
        check(found | {"transformers, eager": lambda: right() * (1 + 1e-4)})


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_networks_start_with_the_same_loss(dtype: torch.dtype):
    losses = [network(name, 8, CPU, dtype)().item() for name in NAMES]
    assert losses == pytest.approx([torch.tensor(64.0).log().item()] * len(NAMES), rel=0.05)


@pytest.mark.parametrize("megabytes", [2, 100])
def test_memory_of_a_pass_is_what_it_holds_at_once(megabytes: int):
    """Three tensors, of which two are there together; what was there before and what remains of it do not count."""
    held = [torch.ones(10, 250_000)]

    def run() -> Tensor:
        held[:] = held[:1]
        first = torch.ones(megabytes, 250_000)
        second = first + held[0][:1]
        del first
        return (second + 1)[0, 0]

    assert peak(run) == pytest.approx(2 * megabytes, abs=0.01)


def record() -> dict[str, Any]:
    """What would be in experts.json: transformers takes twice and thrice our time, an expert's matrix 5 microseconds."""
    found = {"dense": 50.0, "tiglon": 100.0, "transformers, grouped_mm": 200.0, "transformers, eager": 300.0}
    rows = [{"experts": count, "found": found} for count in (8, 128)]
    titles = ("One layer: forward and backward", "One layer: peak memory")
    return {
        "about": "made up", "tables": dict.fromkeys(titles, rows),
        "sizes": {"dense, millions": 2.0, "experts, millions": 2.04, "matrices": 2000},
        "updates": {name: {"dense": 10.0, "experts": 20.0} for name in UPDATED},
    }  # fmt: skip


def test_table_has_their_figures_over_ours():
    header, _, first, second = table(record()["tables"]["One layer: peak memory"], "MB")
    assert "tiglon, MB" in header and "eager over tiglon" in header
    assert first == "| 8, 2 | 50 | 100 | 200 | 300 | **2.00** | **3.00** |" and second.startswith("| 128, 32 |")


def test_page_comes_from_the_file_alone(tmp_path: Path):
    write(record(), tmp_path)
    text = (tmp_path / "experts.md").read_text()
    assert text == page(json.loads((tmp_path / "experts.json").read_text()))
    assert len(re.findall(r"\| 10 \| 20 \| \*\*2\.00\*\* \| \+5 \|", text)) == len(UPDATED)
    assert (tmp_path / "experts.png").read_bytes().startswith(b"\x89PNG")
