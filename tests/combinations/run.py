"""Start one whole configuration as a user does, each rank in a fresh fork of a server that has done its imports."""

import os
from dataclasses import dataclass
from pathlib import Path

from launch.config import RunConfig
from launch.load_config import load_config
from launch.train import main
from tests.ranks import run_ranks

CONFIG = Path(__file__).parent.parent.parent / "launch/configs/quickstart.toml"
SECONDS = 300


@dataclass(frozen=True)
class Place:
    """Where configurations find their data and leave their runs."""

    corpus: Path
    store: str
    runs: Path

    def fill(self, overrides: list[str], run: str) -> list[str]:
        """Overrides with their places, and a run directory."""
        filled = [text.format(corpus=self.corpus, store=f"{self.store.replace('/a?', f'/{run}?')}") for text in overrides]
        return [*filled, f"run.dir={self.runs / run}"]


@dataclass(frozen=True)
class Ending:
    """How a run ended."""

    statuses: list[int]
    """Of each rank; empty if a rank died or did not answer."""
    screen: str
    log: str
    """Of rank 0."""
    directory: Path

    def fault(self) -> str:
        """What was wrong, or nothing."""
        if self.statuses and not any(self.statuses):
            return ""
        return f"statuses {self.statuses}\n{self.screen[-1500:]}\n{self.log[-3000:]}"


def configuration(overrides: list[str]) -> RunConfig:
    """As the run will see it. Raises ValueError for what is refused there."""
    return load_config(CONFIG, overrides)


def rank_main(rank: int, world_size: int, arguments: list[str], screen: str) -> int:
    """One rank, its screen in a file."""
    descriptor = os.open(f"{screen}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 2)
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    return main(arguments)


def execute(overrides: list[str], ranks: int) -> Ending:
    """Run to the end; `overrides` have their places."""
    directory = Path(overrides[-1].partition("=")[2])
    screen = f"{directory}.screen"
    Path(screen).parent.mkdir(parents=True, exist_ok=True)
    fault, statuses = "", []
    try:
        statuses = run_ranks(
            rank_main, ranks, [str(CONFIG), *overrides], screen, grouped=False, timeout_seconds=SECONDS
        )  # fmt: skip
    except AssertionError as error:
        fault = str(error)
    texts = [Path(f"{screen}-{rank}") for rank in range(ranks)]
    shown = "".join(text.read_text() for text in texts if text.is_file())
    log = directory / "logs" / "rank-0.log"
    return Ending(statuses, f"{shown}{fault}", log.read_text(errors="replace") if log.is_file() else "", directory)
