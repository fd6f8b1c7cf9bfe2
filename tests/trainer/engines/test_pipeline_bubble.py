"""What benchmarks/pipeline.py measures: the order of the passes, and what they leave of the time."""

from typing import Any

import pytest

from benchmarks.pipeline import Case, page, run


def order(passes: list[dict[str, Any]]) -> str:
    """Of a rank: f or b, with stage and micro-batch."""
    return " ".join(f"{one['kind'][0]}{one['stage']}.{one['micro_batch']}" for one in passes)


def test_two_ranks_alternate_forwards_and_backwards():
    plain, interleaved = run([Case(2, 4, "1f1b", 60.0), Case(2, 4, "interleaved", 60.0)], rounds=2)
    first, last = map(order, plain["passes"])
    assert first == "f0.0 f0.1 b0.0 f0.2 b0.1 f0.3 b0.2 b0.3"
    assert last == "f1.0 b1.0 f1.1 b1.1 f1.2 b1.2 f1.3 b1.3"
    last = order(interleaved["passes"][1])
    assert last.startswith("f1.0 f1.1 f3.0 b3.0 f3.1 b3.1") and last.endswith("b1.2 b1.3"), last
    assert plain["formula"] == pytest.approx(1 / 5) and interleaved["formula"] == pytest.approx(1 / 9)
    for found in (plain, interleaved):
        assert all(0 < bubble < 1 for bubble in found["bubbles"])
    assert "| 2 | 4 | interleaved | 11.1% |" in page([plain, interleaved], "about")
