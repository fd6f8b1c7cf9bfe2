"""The covering array: few whole configurations in which every pair of values that is not refused occurs together."""

import functools
import random
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import combinations

from allpairspy import AllPairs

from tests.combinations.options import OPTIONS, Choice, Option, ranks
from tests.combinations.refusals import refused

OPTIONS_BY_NAME = {option.name: option for option in OPTIONS}
Pair = frozenset[tuple[str, str]]
MOST_RANKS = 4
"""Of a configuration: two axes of two ranks each meet, which is what a pair asks for."""
EXAMPLES_ONLY = (
    ("context parallel", "4"),
    ("context parallel", "4-heads"),
    ("pipeline parallel", "4"),
    ("pipeline parallel", "4-interleaved"),
    ("feed forward", "moe-4-ranks"),
)
"""Values that ask for four ranks by themselves: tests/combinations/test_combinations.py has examples of them."""
LAYOUT = ("data ranks", "feed forward", "context parallel", "pipeline parallel", "tensor parallel")
"""Options of which three at a time may not go together."""
SLOW = (("compile", "on"), ("compile", "optimizer-only"))
"""Values that take a compiler's time: they meet each other value in as few configurations as that needs."""

TURN = Fraction(2, 5)
"""Of the array, from a call to the next."""


def pairs(choice: Choice) -> set[Pair]:
    """Every two values of a configuration."""
    return {frozenset(two) for two in combinations(choice.items(), 2)}


def is_slow(choice: Choice) -> bool:
    """Whether a configuration takes a compiler's time."""
    return any(choice[option] == value for option, value in SLOW)


def wanted() -> set[Pair]:
    """Every two values of different options that are legal together."""
    found = set()
    for one, other in combinations(OPTIONS, 2):
        for a in one.values:
            for b in other.values:
                if _legal({one.name: a, other.name: b}):
                    found.add(frozenset({(one.name, a), (other.name, b)}))
    return found


@functools.cache
def whole() -> list[Choice]:
    """The array, the same each time."""
    rows = _without_slow()
    missing = wanted().difference(*map(pairs, rows))
    for slow in SLOW:
        rows += _cover({slow[0]: slow[1]}, {pair for pair in missing if slow in pair})
    quick = {SLOW[0][0]: next(iter(OPTIONS_BY_NAME[SLOW[0][0]].values))}
    for pair in sorted(missing.difference(*map(pairs, rows)), key=sorted):  # what constraints kept the library from placing
        rows += _cover({**quick, **dict(pair)}, {pair})
    return rows


def in_order(first: int) -> list[int]:
    """Numbers of the array's configurations, slow ones spread evenly among the others.

    Each `first` begins TURN further on than the one before: where there is time for that part alone, three calls have them all.
    """
    slow, quick = [], []
    for number, row in enumerate(whole()):
        (slow if is_slow(row) else quick).append(number)
    even = [(place / len(numbers), number) for numbers in (quick, slow) for place, number in enumerate(numbers)]
    begin = first * TURN % 1
    return [number for _, number in sorted(((place - begin) % 1, number) for place, number in even)]


def _without_slow() -> list[Choice]:
    values = [[value for value in option.values if (option.name, value) not in SLOW] for option in OPTIONS]
    names = [option.name for option in OPTIONS]
    # large options first: the rows they ask for are then filled with pairs of the small ones; before them those that rule each
    # other out, or the library would find out at the end of a row that its beginning is in vain
    order = sorted(range(len(names)), key=lambda index: (names[index] not in LAYOUT, -len(values[index])))

    def legal(row: list[str]) -> bool:
        return _legal({names[order[index]]: value for index, value in enumerate(row)})

    found = AllPairs([values[index] for index in order], filter_func=legal)
    rows = [{names[order[index]]: value for index, value in enumerate(row)} for row in found]
    return [{name: row[name] for name in names} for row in rows]


def _cover(start: Choice, missing: set[Pair]) -> list[Choice]:
    """Configurations that contain `start` and between them every missing pair."""
    draw, rows = random.Random(str(sorted(start.items()))), []
    while missing:
        row = _fill(start, draw, missing, _economical)
        if not rows or missing & pairs(row):
            rows.append(row)
        missing = missing - pairs(row)
    return rows


def _fill(start: Choice, draw: random.Random, missing: set[Pair], allowed: Callable[[Choice], bool]) -> Choice:
    """A legal configuration that contains `start` and, where it can, pairs that are missing."""
    while True:
        row = dict(start)
        options = [option for option in OPTIONS if option.name not in start]
        draw.shuffle(options)
        for option in options:
            legal = [value for value in option.values if allowed({**row, option.name: value})]
            useful = [v for v in legal if any(frozenset({pair, (option.name, v)}) in missing for pair in start.items())]
            if not legal:
                break
            row[option.name] = draw.choice(useful or legal)
        else:
            return {option.name: row[option.name] for option in OPTIONS}


def _legal(row: Choice) -> bool:
    return not refused(row) and ranks(row) <= MOST_RANKS and not any(row.get(name) == value for name, value in EXAMPLES_ONLY)


def _economical(row: Choice) -> bool:
    """Legal, and at most two ranks where each has to compile."""
    compiles = (SLOW[0][0], row.get(SLOW[0][0], "")) in SLOW
    return _legal(row) and not (ranks(row) > 2 and compiles)


def drawn(count: int, seed: int) -> Iterator[Choice]:
    """Random whole configurations without a refused pair."""
    for number in range(count):
        yield _fill({}, random.Random(f"{seed}/{number}"), set(), _legal)


def possible(options: tuple[Option, ...] = OPTIONS) -> int:
    """How many pairs there are, refused ones too."""
    return sum(len(one.values) * len(other.values) for one, other in combinations(options, 2))
