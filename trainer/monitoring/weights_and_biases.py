"""A run's records in Weights & Biases (the optional wandb extra)."""

import importlib
import uuid
from pathlib import Path
from typing import Any

from trainer.monitoring.records import escape_html, scalars

WANDB_FILE = "wandb-run.txt"


def find_wandb(project: str) -> Any:
    """The wandb package, which log.wandb = `project` needs.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return importlib.import_module("wandb")
    except ImportError:
        raise ValueError(
            f"log.wandb = '{project}' needs the wandb package, which is not installed; "
            "run pip install 'tiglon[wandb]' or set log.wandb = ''"
        ) from None


class WeightsAndBiases:
    """A Weights & Biases run, which keeps its id when ours resumes."""

    retries = False
    afterwards = "Weights & Biases gets nothing more from this process"

    def __init__(self, directory: Path, project: str, config: dict[str, Any]) -> None:
        package = find_wandb(project)
        self.name = f"wandb project {project}"
        identity = directory / WANDB_FILE
        if not identity.is_file():
            identity.write_text(uuid.uuid4().hex[:8] + "\n")
        self._wandb = package
        self._run = package.init(
            project=project, dir=str(directory), config=config, id=identity.read_text().strip(), resume="allow"
        )
        self._run.define_metric("*", step_metric="step")

    def record(self, record: dict[str, Any]) -> None:
        self._run.log({**scalars(record), "step": record["step"]})

    def text(self, name: str, text: str, step: int) -> None:
        self._run.log({name: self._wandb.Html(f"<pre>{escape_html(text)}</pre>"), "step": step})

    def truncate(self, step: int) -> None:
        """What was sent cannot be taken back."""

    def flush(self) -> None:
        """wandb sends by itself."""

    def close(self) -> None:
        self._run.finish()
