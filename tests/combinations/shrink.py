"""Leave out of a failing configuration every option that does not matter."""

import shlex
from collections.abc import Callable

from tests.combinations.options import OPTIONS, Choice, default, overrides, ranks
from tests.combinations.refusals import refused
from tests.combinations.run import Place


def shrink(choice: Choice, fails: Callable[[Choice], bool]) -> Choice:
    """The choice with as many options as possible at their first value, such that it still fails.

    Halves of what is left are tried first, then single options.
    """
    plain = default()
    changed = [option.name for option in OPTIONS if choice[option.name] != plain[option.name]]
    size = max(1, len(changed) // 2)
    while changed:
        for start in range(0, len(changed), size):
            group = changed[start : start + size]
            candidate = {**choice, **{name: plain[name] for name in group}}
            if not refused(candidate) and fails(candidate):
                choice, changed = candidate, [name for name in changed if name not in group]
                break
        else:
            if size == 1:
                break
            size //= 2
            continue
        size = max(1, min(size, len(changed)))
    return choice


def command(choice: Choice, place: Place) -> str:
    """What a user would type."""
    words = ["tiglon", "train", "launch/configs/quickstart.toml", "--nproc", str(ranks(choice))]
    return shlex.join([*words, *place.fill(overrides(choice), "failing")])
