"""Configuration of training: schedule, batch sizes, parallel layout, checkpoints, evaluation, logging, health."""

import os
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from model.positions.config import PositionConfig

HomePath = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path whose ~ is the home directory: a shell hands run.dir=~/x on as it is."""


class ScheduleConfig(BaseModel):
    """Learning-rate multiplier as a function of the update's number, counted from 1."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: Literal["constant", "linear", "cosine", "warmup-stable-decay", "piecewise"] = Field(
        default="cosine", description="Shape after the warm-up."
    )
    warmup_steps: int = Field(
        default=100,
        ge=0,
        description="Updates of linear warm-up: update n has n / warmup_steps of the peak, which is reached at update "
        "warmup_steps (update 1 where this is 0).",
    )
    decay_steps: int | None = Field(
        default=None,
        gt=0,
        description="Updates of the decay, the last of which has final_fraction; later ones keep it. linear, cosine: the decay "
        "begins after the peak; default up to update train.steps. warmup-stable-decay: it ends at update train.steps; default "
        "a fifth of train.steps.",
    )
    final_fraction: float = Field(
        default=0.1, ge=0, le=1, description="Multiplier at the end of the decay; not used by constant and piecewise."
    )
    points: list[tuple[int, float]] = Field(
        default_factory=list,
        description="piecewise: (update, multiplier) pairs joined by straight lines from (0, 0), constant after the last.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.kind == "piecewise") != bool(self.points):
            raise ValueError(f"points and kind = 'piecewise' go together, got kind = '{self.kind}' and points = {self.points}")
        numbers = [number for number, _ in self.points]
        if numbers != sorted(set(numbers)):
            raise ValueError(f"points must have increasing updates, got {numbers}")
        for number, factor in self.points:
            if number < 0:
                raise ValueError(f"points must have updates of at least 0, got {number}")
            if factor < 0:
                raise ValueError(f"points must have multipliers of at least 0, got {factor} at update {number}")
        return self


class TrainConfig(BaseModel):
    """Length of the run, batch sizes, precision, compilation and recomputation."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    steps: int = Field(default=1000, gt=0, description="Optimizer updates in the whole run.")
    sequence_length: int = Field(default=256, gt=0, description="Target tokens per sequence.")
    global_batch_size: int = Field(default=32, gt=0, description="Sequences per update, over all ranks.")
    batch_ramp: list[tuple[int, int]] = Field(
        default_factory=list,
        description="Sizes before global_batch_size: (until batch, sequences per update) pairs. [[2000, 64], [5000, 128]]: 64 "
        "until batch 2000, 128 until batch 5000. A batch's number is the step, and more where rewinds left batches behind. "
        "Left unset, a run that resumes with another global_batch_size has it from there on, also in the middle of a ramp.",
    )
    length_ramp: list[tuple[int, int]] = Field(
        default_factory=list,
        description="Lengths before sequence_length: (until batch, target tokens per row) pairs. [[2000, 4096], [5000, 8192]]: "
        "rows of 4,096 until batch 2000, of 8,192 until batch 5000. Each length divides sequence_length, and every sequence of "
        "such a batch is cut into as many rows, so that an update reads the same tokens whatever the ramp (docs/data.md).",
    )
    micro_batch_size: int = Field(default=8, gt=0, description="Sequences per forward pass of a rank.")
    precision: Literal["bf16", "fp32"] = Field(default="bf16", description="bf16: bf16 network, fp32 masters under zero.")
    compile: bool = Field(default=False, description="torch.compile each block (needs a C++ compiler on a CPU).")
    cuda_graphs: bool = Field(
        default=False,
        description="Replay compiled blocks as CUDA graphs: less host time for small networks on a GPU (docs/speed.md).",
    )
    recompute: Literal["none", "experts", "selective", "full", "auto"] = Field(
        default="none",
        description="Activations recomputed in the backward: of experts alone, all but matrix products, or whole blocks; auto: "
        "as much as the planner finds necessary.",
    )

    @property
    def batch_tokens(self) -> int:
        """Target tokens per update, after the ramp."""
        return self.global_batch_size * self.sequence_length

    @property
    def batch_sizes(self) -> list[int]:
        """Sequences per update, in the order of the run."""
        return [*(size for _, size in self.batch_ramp), self.global_batch_size]

    @property
    def row_lengths(self) -> list[int]:
        """Target tokens per row, in the order of the run."""
        return [*(length for _, length in self.length_ramp), self.sequence_length]

    @model_validator(mode="after")
    def _ramps_go_on(self) -> Self:
        for key, ramp in (("batch_ramp", self.batch_ramp), ("length_ramp", self.length_ramp)):
            steps = [step for step, _ in ramp]
            if steps != sorted({step for step in steps if step > 0}):
                raise ValueError(f"{key} must have increasing steps above 0, got {steps}")
        if min(self.batch_sizes) < 1:
            raise ValueError(f"batch_ramp must have at least 1 sequence per update, got {min(self.batch_sizes)}")
        if min(self.row_lengths) < 1:
            raise ValueError(f"length_ramp must have at least 1 token per row, got {min(self.row_lengths)}")
        return self


STAGE_3 = {
    "stage3_max_live_parameters": 10**9,
    "stage3_max_reuse_distance": 10**9,
    "stage3_prefetch_bucket_size": 5 * 10**7,
    "stage3_param_persistence_threshold": 10**5,
}
"""What DeepSpeed's stage 3 keeps gathered, in elements: its defaults, fixed here because the planner computes with them."""


class ParallelConfig(BaseModel):
    """How ranks share the work."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    tensor_parallel_size: int = Field(default=1, gt=0, description="Ranks that split every layer; data parallel over the rest.")
    sequence_parallel: bool = Field(default=False, description="Also split the residual stream along tokens (Megatron).")
    context_parallel_size: int = Field(
        default=1,
        gt=0,
        description="Ranks that share the tokens of every sequence, with the same weights (docs/context.md).",
    )
    expert_parallel_size: int = Field(
        default=1,
        gt=0,
        description="Ranks that split the experts among themselves, out of those that share weights otherwise "
        "(docs/experts.md).",
    )
    context_exchange: Literal["gather", "heads"] = Field(
        default="gather",
        description="Context parallel: gather the keys and values of all ranks (gather), or exchange tokens for heads, so that "
        "each rank has whole sequences of its share of the heads (heads).",
    )
    pipeline_parallel_size: int = Field(
        default=1, gt=0, description="Ranks that have the layers of the network one after the other (docs/pipeline.md)."
    )
    pipeline_schedule: Literal["1f1b", "interleaved"] = Field(
        default="1f1b",
        description="Pipeline parallel: a rank has one run of layers and alternates forwards and backwards (1f1b), or several "
        "runs, which shortens the bubble and sends more (interleaved).",
    )
    pipeline_stages_per_rank: int | None = Field(
        default=None, gt=0, description="Runs of layers that a rank has. Default: 2, and with 1f1b 1."
    )
    expert_parallel_size: int = Field(
        default=1,
        gt=0,
        description="Ranks that split the experts among themselves, and share all other weights (docs/experts.md).",
    )
    engine: Literal["zero", "fold"] = Field(
        default="zero", description="zero: DeepSpeed ZeRO. fold: Tiger without gradient buffers, 4 bytes per parameter in bf16."
    )
    zero_stage: Literal[1, 2, 3] = Field(
        default=1, description="zero: partition states (1), gradients too (2), weights too (3)."
    )
    zero_hpz_partition_size: int | None = Field(
        default=None,
        gt=0,
        description="zero 3: data-parallel ranks that hold a second copy of the weights together (DeepSpeed's hpZ); 1 = none. "
        "Default: those of a node, where there are several nodes and the copy fits.",
    )
    offload: Literal["none", "cpu"] = Field(default="none", description="zero: keep the optimizer state in host memory.")
    reduce_bucket_elements: int = Field(default=50_000_000, gt=0, description="Elements sent in one collective.")
    timeout_seconds: int = Field(default=600, gt=0, description="A collective that takes longer ends the run.")

    @property
    def pipeline_stages(self) -> int:
        """Runs of layers that the network is cut into."""
        if self.pipeline_parallel_size == 1 or self.pipeline_schedule == "1f1b":
            return self.pipeline_parallel_size
        return self.pipeline_parallel_size * (self.pipeline_stages_per_rank or 2)

    def can_schedule(self, micro_batches: int) -> bool:
        """Whether the pipeline's schedule can run with so many micro-batches of an update: at least one for each rank and,
        interleaved, the same number in every round over the ranks."""
        ranks = self.pipeline_parallel_size
        if ranks == 1 or self.pipeline_schedule == "1f1b":
            return micro_batches >= ranks
        return micro_batches >= ranks and micro_batches % (micro_batches // ranks) == 0

    @model_validator(mode="after")
    def _pipeline_possible(self) -> Self:
        stages, one = self.pipeline_stages_per_rank, self.pipeline_schedule == "1f1b"
        if stages is not None and one != (stages == 1):
            raise ValueError(
                f"pipeline_stages_per_rank = {stages} cannot be used with pipeline_schedule = '{self.pipeline_schedule}', with "
                f"which a rank has {'one stage' if one else 'several stages'}; use "
                + ("pipeline_stages_per_rank=1, or interleaved" if one else "2 or more, or pipeline_schedule=1f1b")
            )
        if self.pipeline_parallel_size == 1:
            return self
        if self.engine == "zero" and self.zero_stage == 3:
            raise ValueError(
                f"pipeline_parallel_size = {self.pipeline_parallel_size} cannot be used with zero_stage = 3: it would gather "
                "a stage's weights again for every micro-batch, there and back; use zero_stage = 1 or 2, or engine = 'fold'"
            )
        if self.offload != "none":
            raise ValueError(
                f"pipeline_parallel_size = {self.pipeline_parallel_size} cannot be used with offload = '{self.offload}': "
                "gradients are summed on the device, stage by stage; use offload = 'none'"
            )
        return self

    @model_validator(mode="after")
    def _experts_possible(self) -> Self:
        if self.expert_parallel_size == 1:
            return self
        if self.engine == "zero" and self.zero_stage == 3:
            raise ValueError(
                f"expert_parallel_size = {self.expert_parallel_size} cannot be used with zero_stage = 3: DeepSpeed would cut "
                "experts for ranks that do not have them; use zero_stage = 1 or 2, or engine = 'fold'"
            )
        if self.offload != "none":
            raise ValueError(
                f"expert_parallel_size = {self.expert_parallel_size} cannot be used with offload = '{self.offload}': gradients "
                "of experts are summed on the device; use offload = 'none'"
            )
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.sequence_parallel and self.tensor_parallel_size == 1:
            raise ValueError("sequence_parallel needs tensor_parallel_size > 1")
        if (self.zero_hpz_partition_size or 1) > 1 and (self.engine != "zero" or self.zero_stage != 3):
            raise ValueError(
                f"zero_hpz_partition_size = {self.zero_hpz_partition_size} belongs to engine = 'zero' with zero_stage = 3, "
                "the only one that gathers weights; leave it out"
            )
        if self.engine == "fold" and self.offload != "none":
            raise ValueError("engine = 'fold' has no optimizer state to offload; use offload = 'none'")
        return self


class CheckpointConfig(BaseModel):
    """When checkpoints are saved, and which one a run resumes from."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    every_steps: int = Field(default=100, ge=0, description="Steps between checkpoints; 0 = only at the end.")
    keep: int = Field(default=2, ge=1, description="Number of newest checkpoints to keep.")
    keep_every_steps: int = Field(default=0, ge=0, description="Keep every checkpoint at a multiple of this; 0 = none.")
    resume: HomePath = Field(
        default="auto", min_length=1, description="auto (newest intact), never, or the path of a checkpoint."
    )
    reset_optimizer: bool = Field(default=False, description="Load the weights only, and start again at step 0.")
    asynchronous: bool = Field(default=True, description="Write while the next steps run; the loop waits for the copy only.")
    max_failures: int = Field(default=3, ge=1, description="Consecutive failed saves that end the run.")
    directory: HomePath = Field(default="", description="Where to save, local or an object store. Default: RUN/checkpoints.")


class EvaluateConfig(BaseModel):
    """Held-out loss."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    every_steps: int = Field(default=0, ge=0, description="Steps between evaluations; 0 = only at the end.")
    tokens: int = Field(
        default=131072,
        ge=0,
        description="Validation tokens that are scored, each once, the same for every seed, batch size and layout; 0 = all.",
    )
    contexts: list[int] = Field(
        default_factory=list,
        description="Further context lengths (tokens) at which the same tokens are scored, each after more than half a "
        "context.",
    )
    chunk_tokens: int = Field(
        default=32768,
        ge=0,
        description="Rows of longer contexts pass through the network in chunks of so many tokens, so that activations do not "
        "grow with the context (docs/attention.md); 0 = in one, always.",
    )
    position: PositionConfig | None = Field(
        default=None,
        description="Position map to evaluate with; default: the training map. rope_theta, trained_length and log_n are those "
        "of [position] unless given here.",
    )


class HealthConfig(BaseModel):
    """When a run is unhealthy, and what is done."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    spike_sigmas: float = Field(
        default=0.0, ge=0, description="A loss this many standard deviations above its running mean is a spike; 0 = off."
    )
    spike_window_steps: int = Field(default=128, gt=1, description="Steps of the running mean and deviation.")
    spike_action: Literal["record", "skip", "rewind"] = Field(
        default="record",
        description="record only, skip the update, or rewind: go back to the last checkpoint and skip the batches since.",
    )
    max_skipped_steps: int = Field(default=20, gt=0, description="Consecutive skipped updates that end the run.")
    replica_check_every_steps: int = Field(
        default=0, ge=0, description="Steps between checks that replicas are equal; 0 = off."
    )
    hang_seconds: float = Field(
        default=600.0, ge=0, description="A step that takes longer writes all stacks to the log and ends the run; 0 = off."
    )
    grace_seconds: float = Field(
        default=30.0, gt=0, description="From a stop signal to the end; plain torchrun needs the same value (docs/launch.md)."
    )


class ProfileConfig(BaseModel):
    """A window of steps written as a Chrome trace."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    start_step: int = Field(default=-1, ge=-1, description="First profiled step; -1 = none.")
    steps: int = Field(default=3, gt=0, description="Profiled steps.")
