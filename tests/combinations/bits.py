"""One line for each configuration of the array: a digest of every loss, norm, rate and final weight, with all their bits.

    python -m tests.combinations.bits > before.txt       # on the one commit
    python -m tests.combinations.bits > after.txt        # on the other, on the same machine
    diff before.txt after.txt                            # empty where a change was to leave all numbers as they are

Sums in floating point differ from machine to machine, so nothing is compared with a file that is kept.
"""

import argparse
import hashlib
import shutil
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from tests.combinations import array
from tests.combinations.__main__ import make_place
from tests.combinations.check import measured
from tests.combinations.options import Choice, overrides, ranks
from tests.combinations.refusals import refused
from tests.combinations.run import Place, configuration, execute


def main(arguments: list[str] | None = None) -> int:
    """0: every configuration ran to its end or was refused."""
    parser = argparse.ArgumentParser(prog="python -m tests.combinations.bits", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--part", default="1/1", metavar="K/N", help="every N-th configuration, from the K-th on")
    part, parts = map(int, parser.parse_args(arguments).part.split("/"))
    status = 0
    with ExitStack() as stack:
        place = make_place(Path(stack.enter_context(tempfile.TemporaryDirectory())), stack)
        for number, choice in list(enumerate(array.whole()))[part - 1 :: parts]:
            line = digest(choice, place, f"bits{number}")
            status |= line.startswith("it ended with")
            print(f"{number}: {line}", flush=True)
    return status


def digest(choice: Choice, place: Place, name: str) -> str:
    """SHA-256 of what a run came to, by name; the words of its refusal or of its fault."""
    if refusals := refused(choice):
        return f"refused: {refusals[0].words}"
    filled = place.fill(overrides(choice), name)
    ending = execute(filled, ranks(choice))
    try:
        if fault := ending.fault():
            return f"it ended with {fault}"
        found = hashlib.sha256()
        for key, value in sorted(measured(ending, configuration(filled)).items()):
            bits = value.contiguous().view(torch.uint8).numpy().tobytes() if isinstance(value, Tensor) else value.hex().encode()
            found.update(key.encode() + bits)
        return found.hexdigest()[:32]
    finally:
        shutil.rmtree(ending.directory, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
