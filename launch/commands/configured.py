"""The configuration of a command, with a word about keys that have other names now."""

import sys
from collections.abc import Sequence
from pathlib import Path

from launch.config import RunConfig, load_config


def load_told(path: str | Path, overrides: Sequence[str] | None) -> RunConfig:
    """As load_config; each key that was given by an earlier name is told on stderr."""
    config = load_config(path, list(overrides or []))
    for sentence in config.renamed:
        print(f"tiglon: {sentence}", file=sys.stderr)
    return config
