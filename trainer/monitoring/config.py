"""The [log] section, and the trackers by name."""

from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from trainer.monitoring.tracker import Tracker
from trainer.monitoring.weights_and_biases import WeightsAndBiases

TRACKERS: dict[str, type[Tracker]] = {"wandb": WeightsAndBiases}
"""Trackers of experiments, by the value of log.tracker, which is the name of the package."""
NO_TRACKER = "none"

if TYPE_CHECKING:
    TrackerName = str
else:
    TrackerName = Literal[(NO_TRACKER, *TRACKERS)]


class LogConfig(BaseModel):
    """What is recorded during training."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    every_steps: int = Field(default=10, gt=0, description="Steps between metric records.")
    tensorboard: bool = Field(default=True, description="Write RUN/tensorboard.")
    tracker: TrackerName = Field(
        default=NO_TRACKER, description="Tracker of experiments that gets the records too (needs the extra of its name)."
    )
    project: str = Field(default="tiglon", min_length=1, description="Project of the tracker.")
    sample_prompt: str = Field(default="", description="Prompt that is continued at every evaluation and shown in TensorBoard.")
    sample_tokens: int = Field(default=100, gt=0, description="Maximum length of a sample in tokens, without its prompt.")
    attention_every_steps: int = Field(default=0, ge=0, description="Steps between attention diagnostics; 0 = none.")
    spectrum_every_steps: int = Field(
        default=0, ge=0, description="Steps between singular values of the weight matrices; 0 = none."
    )
