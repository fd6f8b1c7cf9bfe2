"""What is quick enough for everyone's test run: one of each kind. The rest is run by -m slow."""

from collections.abc import Iterable
from typing import Any

import pytest

from tests.model.huggingface.stock import ALL, CASES

FIRST = [case for case in ALL if case.name == next(iter(CASES[case.family]))]
"""The first case of every family."""


def some_slow(values: Iterable[Any], quick: Iterable[Any]) -> list[Any]:
    """Parameters of a test, of which those that are not among `quick` are marked as slow."""
    quick = list(quick)
    return [value if value in quick else pytest.param(value, marks=pytest.mark.slow) for value in values]


cases = pytest.mark.parametrize("case", some_slow(ALL, FIRST), ids=str)
"""Every case of every family, the first of each in everyone's test run."""
