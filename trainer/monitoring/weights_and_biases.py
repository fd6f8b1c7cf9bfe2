"""A run's records in Weights & Biases (the optional wandb extra)."""

import netrc
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from trainer.monitoring.records import escape_html, scalars
from trainer.monitoring.tracker import Tracker


class WeightsAndBiases(Tracker):
    """A Weights & Biases run, whose id is made here."""

    package, title, run_file = "wandb", "Weights & Biases", "wandb-run.txt"

    @classmethod
    def missing(cls, environment: Mapping[str, str]) -> str:
        """The key of an account, looked for where the package does: its variables, and the file that `wandb login` writes."""
        if environment.get("WANDB_API_KEY") or environment.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
            return ""
        host = urlsplit(environment.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
        with suppress(OSError, netrc.NetrcParseError):
            if netrc.netrc(environment.get("NETRC")).authenticators(host):
                return ""
        return f"no key for {host} is known: run wandb login, set WANDB_API_KEY, or WANDB_MODE=offline to keep the run here"

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
