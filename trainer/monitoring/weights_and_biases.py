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

_ENOUGH = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_DISABLED")
"""Variables with which the package needs no more."""


class WeightsAndBiases(Tracker):
    """A Weights & Biases run, whose id is made here."""

    package, title, run_file = "wandb", "Weights & Biases", "wandb-run.txt"

    @classmethod
    def missing(cls, environment: Mapping[str, str]) -> str:
        """The key of an account, looked for where the package does: in variables, in the file that `wandb login` writes, and in
        its settings, which may say that it needs none."""
        if any(environment.get(name) for name in _ENOUGH) or environment.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
            return ""
        folders = Path("wandb"), Path(environment.get("WANDB_CONFIG_DIR", "~/.config/wandb")).expanduser()
        for file in (folder / "settings" for folder in folders):
            if file.is_file() and any(word in file.read_text(errors="replace") for word in ("mode", "disabled", "api_key")):
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
