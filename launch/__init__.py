"""From a configuration to running processes: command line, composition of a run, environment."""

import sys
from importlib.machinery import PathFinder
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent


def _take_precedence() -> None:
    """Import `data`, `model` and `trainer` from here, though the working directory may hold a data.py or model.py.

    `python -m` and torchrun put that directory first in sys.path. Nothing of ours has been imported yet. A program that
    imports tiglon may mean its own file by such a name, so there it is an error, and only folders without Python are passed
    over: a package at the end of sys.path comes before them.

    Raises:
        ImportError: another file of that name has been imported already, or would be.
    """
    root, program = str(_ROOT), "tiglon" not in sys.modules
    for name in ("data", "model", "trainer"):
        loaded = sys.modules.get(name)
        spec = loaded.__spec__ if loaded is not None else PathFinder.find_spec(name)
        if spec is None:
            continue
        directories = [Path(path).resolve() for path in spec.submodule_search_locations or () if path]
        if directories == [_ROOT / name]:
            continue
        if loaded is not None or (spec.origin and not program):
            how = "comes first on sys.path" if loaded is None else "was imported before"
            raise ImportError(
                f"tiglon needs its package '{name}', but {spec.origin or ', '.join(map(str, directories))} {how}; rename it"
            )
        if program:
            sys.path.insert(0, root)
            return
        if root not in sys.path:
            sys.path.append(root)


_take_precedence()
