"""From a configuration to running processes: command line, composition of a run, environment."""

import sys
from importlib.machinery import PathFinder
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent


def _take_precedence() -> None:
    """Import `data`, `model` and `trainer` from here, though the working directory may hold a data.py or model.py.

    `python -m` and torchrun put that directory first in sys.path. Nothing of ours has been imported yet. A program that
    imports tiglon keeps its sys.path, since it may mean those files by these names.

    Raises:
        ImportError: the other file has been imported already, or would be by a program that imports tiglon.
    """
    for name in ("data", "model", "trainer"):
        loaded = sys.modules.get(name)
        spec = loaded.__spec__ if loaded is not None else PathFinder.find_spec(name)
        if spec is None:
            continue
        directories = [Path(path).resolve() for path in spec.submodule_search_locations or () if path]
        if directories == [_ROOT / name]:
            continue
        if loaded is not None or "tiglon" in sys.modules:
            how = "was imported before" if loaded is not None else "comes first on sys.path"
            place = spec.origin or ", ".join(map(str, directories))
            raise ImportError(f"tiglon needs its package '{name}', but {place} {how}; rename it")
        sys.path.insert(0, str(_ROOT))
        return


_take_precedence()
