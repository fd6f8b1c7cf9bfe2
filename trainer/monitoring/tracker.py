"""What a tracker of experiments is to a run. docs/extending.md adds one."""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar


class Tracker(ABC):
    """A run's records in a tracker, whose own run keeps its identity when ours resumes.

    It is a sink (MetricSink in trainer/monitoring/metrics.py) that sends by itself and cannot take back what it has sent. Every
    method may raise what the package behind it raises.
    """

    package: ClassVar[str]
    """What is imported, and the extra that installs it."""
    title: ClassVar[str]
    """For messages."""
    run_file: ClassVar[str]
    """File in the run directory with the identity of the tracker's run; like the records it belongs to one lineage."""

    retries = False
    name: str

    @abstractmethod
    def __init__(self, directory: Path, project: str, config: dict[str, Any]) -> None:
        """Begin the tracker's run, or continue the one that `directory`/`run_file` names, and set `name`.

        Args:
            directory: the run directory, which exists.
            config: the resolved configuration, to be shown.

        Raises:
            ValueError: the package is not installed.
        """

    @abstractmethod
    def record(self, record: dict[str, Any]) -> None:
        """Send one record: {"kind", "step", ...} with plain values."""

    @abstractmethod
    def text(self, name: str, text: str, step: int) -> None:
        """Send a text, such as a sample of the model."""

    @abstractmethod
    def close(self) -> None:
        """End the tracker's run; return when everything is sent."""

    @property
    def afterwards(self) -> str:
        """As in MetricSink."""
        return f"{self.title} gets nothing more from this process"

    def truncate(self, step: int) -> None:  # noqa: B027 (most trackers leave it so)
        """What was sent cannot be taken back."""

    def flush(self) -> None:  # noqa: B027
        """It sends by itself."""

    @classmethod
    def find_package(cls) -> Any:
        """The package.

        Raises:
            ValueError: it is not installed.
        """
        try:
            return importlib.import_module(cls.package)
        except ImportError:
            raise ValueError(
                f"log.tracker = '{cls.package}' needs the {cls.package} package, which is not installed; "
                f"run pip install 'tiglon[{cls.package}]' or set log.tracker = 'none'"
            ) from None

    @classmethod
    def missing(cls, environment: Mapping[str, str]) -> str:
        """What a run would lack beside the package, in one sentence; "" where nothing is known to be missing.

        Args:
            environment: the process's variables.
        """
        return ""

    @classmethod
    def identity(cls, directory: Path, make: Callable[[], str]) -> str:
        """The identity of the tracker's run, which the first process of the run makes and keeps in `run_file`."""
        kept = directory / cls.run_file
        if not kept.is_file():
            kept.write_text(f"{make()}\n")
        return kept.read_text().strip()
