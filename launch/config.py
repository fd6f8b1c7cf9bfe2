"""The configuration of a run: one section beside each owner, gathered here."""

from contextlib import suppress
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from data.config import DataConfig
from model.config import ModelConfig
from model.positions.config import PositionConfig
from trainer.config import (
    CheckpointConfig,
    EvaluateConfig,
    HealthConfig,
    HomePath,
    ParallelConfig,
    ProfileConfig,
    ScheduleConfig,
    TrainConfig,
)
from trainer.monitoring.config import LogConfig
from trainer.optimizers.config import OptimizerConfig

RESOLVED = "resolved"
"""Table of RUN/config.toml with every value that acted; it is skipped when the file is read as a configuration."""


class RunSection(BaseModel):
    """The run itself."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    dir: HomePath = Field(
        default="runs/default", min_length=1, description="Run directory: config, metrics, checkpoints, logs, report."
    )
    seed: int = Field(default=0, ge=0, description="Seed of the initial weights and of the data order.")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto = cuda where there is one.")
    deterministic: bool = Field(
        default=False,
        description="The same bits from every repetition and resume on a GPU too, by slower kernels; on a CPU they are anyway.",
    )


class RunConfig(BaseModel):
    """Everything that decides a run."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    run: RunSection = Field(default=RunSection(), description="Directory, seed, device.")
    model: ModelConfig = Field(default=ModelConfig(), description="The network.")
    position: PositionConfig = Field(default=PositionConfig(), description="The position map.")
    data: DataConfig = Field(default=DataConfig(), description="The corpus.")
    optimizer: OptimizerConfig = Field(default=OptimizerConfig(), description="The update rule.")
    schedule: ScheduleConfig = Field(default=ScheduleConfig(), description="The learning rate over time.")
    train: TrainConfig = Field(default=TrainConfig(), description="Steps, batches, precision.")
    parallel: ParallelConfig = Field(default=ParallelConfig(), description="How ranks share the work.")
    checkpoint: CheckpointConfig = Field(default=CheckpointConfig(), description="Saving and resuming.")
    evaluate: EvaluateConfig = Field(default=EvaluateConfig(), description="Held-out loss.")
    log: LogConfig = Field(default=LogConfig(), description="Records and samples.")
    health: HealthConfig = Field(default=HealthConfig(), description="What counts as unhealthy.")
    profile: ProfileConfig = Field(default=ProfileConfig(), description="Traces.")

    _renamed: tuple[str, ...] = PrivateAttr(())

    @property
    def renamed(self) -> tuple[str, ...]:
        """One sentence for each key that was given by the name of an earlier version (launch/versions.py)."""
        return self._renamed

    def remember_renamed(self, sentences: list[str]) -> None:
        """Keep those sentences with the configuration; nothing that acts changes."""
        self._renamed = tuple(sentences)

    @model_validator(mode="before")
    @classmethod
    def _fill_evaluation_position(cls, values: Any) -> Any:
        match values:
            case {"evaluate": {"position": dict(given), **others}}:
                with suppress(ValidationError):  # a mistake in [position] is reported when that section is validated
                    trained = PositionConfig.model_validate(values.get("position", {}))
                    return {**values, "evaluate": {**others, "position": trained.evaluation_values(given)}}
        return values
