"""The shipped configurations: their names, and what their headers say. Imports nothing that takes time."""

import difflib
import re
from pathlib import Path

SHIPPED = Path(__file__).parent / "configs"
"""Directory of the shipped configurations."""


def shipped_names() -> list[str]:
    """The name of every shipped configuration, sorted."""
    return sorted(path.stem for path in SHIPPED.glob("*.toml"))


def is_shipped(name: str | Path) -> bool:
    """Whether this names a shipped configuration; a file of that name comes first."""
    return str(name) in shipped_names() and not Path(name).is_file()


def shipped_text(name: str) -> str:
    """The text of a shipped configuration.

    Raises:
        FileNotFoundError: there is none of this name; one sentence with the nearest and with all of them.
    """
    names = shipped_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, 1)
        hint = f"did you mean {near[0]}? There are" if near else "there are"
        raise FileNotFoundError(f"no shipped configuration has the name {name}; {hint} {', '.join(names)}")
    return (SHIPPED / f"{name}.toml").read_text()


def lesson(text: str) -> str:
    """What a configuration teaches: the first sentence of its header."""
    paragraph = " ".join(line.removeprefix("# ") for line in text.partition("\n#\n")[0].splitlines())
    return re.split(r"(?<=\.) ", paragraph, maxsplit=1)[0]


def plan_command_of(text: str) -> str:
    """The command in a configuration's header that plans it."""
    return next(line.removeprefix("# ").strip() for line in text.splitlines() if line.startswith("#     tiglon plan "))
