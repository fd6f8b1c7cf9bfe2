"""A run's records in Weights & Biases (the optional wandb extra)."""

import uuid
from pathlib import Path
from typing import Any

from trainer.monitoring.records import escape_html, scalars
from trainer.monitoring.tracker import Tracker


class WeightsAndBiases(Tracker):
    """A Weights & Biases run, whose id is made here."""

    package, title, run_file = "wandb", "Weights & Biases", "wandb-run.txt"

    def __init__(self, directory: Path, project: str, config: dict[str, Any]) -> None:
        self._wandb = self.find_package()
        self.name = f"wandb project {project}"
        identity = self.identity(directory, lambda: uuid.uuid4().hex[:8])
        self._run = self._wandb.init(project=project, dir=str(directory), config=config, id=identity, resume="allow")
        self._run.define_metric("*", step_metric="step")

    def record(self, record: dict[str, Any]) -> None:
        self._run.log({**scalars(record), "step": record["step"]})

    def text(self, name: str, text: str, step: int) -> None:
        self._run.log({name: self._wandb.Html(f"<pre>{escape_html(text)}</pre>"), "step": step})

    def close(self) -> None:
        self._run.finish()
