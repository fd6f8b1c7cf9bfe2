"""The configuration of a command, with a word about keys that have other names now, and what its run would resume from."""

import sys
from collections.abc import Sequence
from pathlib import Path

from launch.config import RunConfig
from launch.config_checks import check_config
from launch.load_config import load_config
from launch.preflight import Preflight, begin_run
from launch.runtime import ALONE


def load_told(path: str | Path, overrides: Sequence[str] | None) -> RunConfig:
    """As load_config; each key that was given by an earlier name is told on stderr."""
    config = load_config(path, list(overrides or []), settled=False)
    for sentence in config.renamed:
        print(f"tiglon: {sentence}", file=sys.stderr)
    return config


def load_begun(path: str | Path, overrides: Sequence[str] | None) -> Preflight:
    """As load_told, settled with the checkpoint that `tiglon train` would resume from, which is told on stderr.

    A checkpoint that is not on this computer is told too; the run is then taken as one that begins at step 0.

    Raises:
        ValueError: it contradicts the configuration.
    """
    config = load_told(path, overrides)
    try:
        begun = begin_run(config, ALONE)
    except OSError as error:
        check_config(config)
        print(f"tiglon: taken as a run from step 0: {error}", file=sys.stderr)
        return Preflight(config)
    if begun.manifest is not None and not begun.weights_only:
        print(f"tiglon: as it resumes from {begun.path}, step {begun.state.step:,}", file=sys.stderr)
    return begun
