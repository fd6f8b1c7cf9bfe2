"""Where tokens come from."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class SourceConfig(BaseModel):
    """One prepared corpus and its share of a mixture."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    path: str = Field(description="Directory of prepared shards (tiglon prepare), local or an object-store address.")
    weight: float = Field(default=1.0, gt=0, description="Share of the samples, relative to the other sources.")


class PhaseConfig(BaseModel):
    """A stretch of training that reads its own mixture."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    from_step: int = Field(ge=0, description="Number of its first batch: the step, and more where rewinds left batches behind.")
    sources: list[SourceConfig] = Field(min_length=1, description="The mixture from that batch on.")


class DataConfig(BaseModel):
    """Tokenizer, training mixture, held-out text."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    tokenizer: str = Field(default="", description="Directory of the tokenizer the shards were prepared with.")
    train: str | list[SourceConfig] = Field(default="", description="Prepared shards: one path, or a list of {path, weight}.")
    validation: str | list[SourceConfig] = Field(default="", description="Held-out shards; empty = no evaluation.")
    curriculum: list[PhaseConfig] = Field(
        default_factory=list, description="Mixtures that replace `train` from given batches on, in order of from_step."
    )
    pack: Literal["stream", "documents"] = Field(
        default="stream",
        description="What a training row holds. stream: consecutive tokens, which cut documents anywhere; documents: whole "
        "documents, cut only where one is longer than a row, and padding (docs/data.md).",
    )
    document_mask: bool = Field(default=False, description="Attention stays inside a document of a packed sequence.")
    prefetch_steps: int = Field(default=2, ge=0, description="Steps of batches read ahead in the background; 0 = none.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        starts = [phase.from_step for phase in self.curriculum]
        if starts != sorted(set(starts)):
            raise ValueError(f"curriculum phases must have increasing from_step, got {starts}")
        return self

    def sources(self, part: str) -> list[SourceConfig]:
        """The mixture of `train` or `validation` as a list (empty when the part is not configured)."""
        value: str | list[SourceConfig] = getattr(self, part)
        if isinstance(value, str):
            return [SourceConfig(path=value)] if value else []
        return value
