"""Step speed of the working tree beside that of a commit, interleaved.

    python -m benchmarks.against 8f9b0ee [--rounds 5] [--steps 4] [--only NAME ...]

Each tree trains the same networks on the same tokens in a process of its own (benchmarks/peers/tiglon.py of that tree), with
one thread. In every round both train in turn while the other sleeps; which one begins alternates. A ratio above 1 says that the
working tree is faster: it is of the medians of processor time, so other programs on the machine disturb it little.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.contestants import SHAPES
from benchmarks.peers.worker import Job
from benchmarks.structure import unpack

ROOT = Path(__file__).parent.parent
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "ZeRO 1, AdamW": ("quickstart", {}),
    "ZeRO 1, AdamW, compiled": ("quickstart", {"compile": True}),
    "ZeRO 3, Lion": ("quickstart", {"zero_stage": 3, "optimizer": "lion"}),
    "fold, Tiger": ("quickstart", {"engine": "fold", "optimizer": "tiger"}),
    "8m, ZeRO 1, AdamW": ("8m", {}),
}
"""By name: the shape of the network and the options of benchmarks/peers/tiglon.py."""


class Tree:
    """A process that trains in one tree when it is asked to."""

    def __init__(self, root: Path, job: Job):
        self._root = root
        environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.peers.tiglon", json.dumps(asdict(job))],
            cwd=root, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self._answer()

    def train(self, steps: int) -> dict[str, Any]:
        """Seconds, processor seconds and the last loss of some steps."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self._process.communicate("0\n", timeout=60)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        found = json.loads(line) if line else {"error": "it ended without an answer"}
        if "error" in found:
            raise RuntimeError(f"the trainer in {self._root} failed: {found['error']}")
        return found


def measure(name: str, before: Path, rounds: int, steps: int) -> tuple[float, float, bool]:
    """(ratio of processor time, ratio of wall-clock time, whether both lost the same to the last bit) of one row."""
    shape, options = ROWS[name]
    job = Job(SHAPES[shape].model(), 256, 8, "cpu", 1e-3, options)
    trees = {"before": Tree(before, job), "now": Tree(ROOT, job)}
    try:
        found: dict[str, list[dict[str, Any]]] = {tree: [each.train(2)] for tree, each in trees.items()}
        for number in range(rounds):
            for tree in list(trees) if number % 2 else list(trees)[::-1]:
                found[tree].append(trees[tree].train(steps))
    finally:
        for each in trees.values():
            each.close()
    middle = {
        (tree, key): median(answer[key] for answer in answers[1:])
        for tree, answers in found.items()
        for key in ("cpu_seconds", "seconds")
    }
    ratios = [middle["before", key] / middle["now", key] for key in ("cpu_seconds", "seconds")]
    same = [a["loss"] for a in found["before"]] == [a["loss"] for a in found["now"]]
    return ratios[0], ratios[1], same


def main() -> int:
    """Print a row for each network; status 1 if losses differ or a ratio is below 0.95."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.against", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("commit", help="what the working tree is set beside")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="of each tree in a round")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS))
    chosen = parser.parse_args()
    status = 0
    with tempfile.TemporaryDirectory() as folder:
        try:
            unpack(chosen.commit, Path(folder))
        except ValueError as error:
            parser.error(str(error))
        print(f"{'':28}{'processor time':>16}{'wall clock':>12}  losses")
        for name in chosen.only:
            processor, wall, same = measure(name, Path(folder), chosen.rounds, chosen.steps)
            print(f"{name:28}{processor:>16.3f}{wall:>12.3f}  {'the same bits' if same else 'DIFFERENT'}", flush=True)
            status |= not same or processor < 0.95
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
