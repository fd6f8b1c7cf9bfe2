"""From a configuration to running processes: command line, composition, the only reader of the environment."""

import sys
from importlib.machinery import PathFinder
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent


def _take_precedence() -> None:
    """Let `data`, `model` and `trainer` be ours, where a data.py or model.py of the working directory comes first.

    `python -m` and torchrun put that directory in front. Nothing of ours has been imported yet.

    Raises:
        ImportError: somebody has imported the other file already.
    """
    for name in ("data", "model", "trainer"):
        loaded = sys.modules.get(name)
        spec = loaded.__spec__ if loaded is not None else PathFinder.find_spec(name)
        if spec is None:
            continue
        places = [Path(place).resolve() for place in spec.submodule_search_locations or () if place]
        if places == [_ROOT / name]:
            continue
        if loaded is not None:
            raise ImportError(f"tiglon needs its package '{name}', but {spec.origin or places} was imported before; rename it")
        sys.path.insert(0, str(_ROOT))
        return


_take_precedence()
