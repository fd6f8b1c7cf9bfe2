"""The parts of a training run, and the operations that the loop in trainer/loop.py is made of."""

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from model.parallel.mesh import Mesh
from trainer.checkpoint.api import Checkpoints, SavedCheckpoint
from trainer.checkpoint.manifest import CheckpointMeta
from trainer.checkpoint.rectangles import StepPart
from trainer.config import (
    CheckpointConfig,
    EvaluateConfig,
    HealthConfig,
    ScheduleConfig,
    TrainConfig,
)
from trainer.engines.base import Engine, MicroBatch, StepHooks
from trainer.monitoring.async_read import AsyncRead
from trainer.monitoring.clock import Clock
from trainer.monitoring.config import LogConfig
from trainer.monitoring.expert_loads import load_records, load_summary
from trainer.monitoring.health import Health, Verdict
from trainer.monitoring.metrics import Metrics
from trainer.monitoring.profile import Profile
from trainer.monitoring.progress import Progress, checkpoint_age, left_behind
from trainer.monitoring.replicas import replica_divergence
from trainer.monitoring.signals import StopVote
from trainer.monitoring.watchdog import Heartbeat
from trainer.optimizers.config import OptimizerConfig
from trainer.optimizers.step import UpdateResult
from trainer.schedule import multiplier
from trainer.state import State, due


class RunEnded(Exception):
    """The run cannot continue; its message, one sentence, says why."""


@dataclass(frozen=True)
class LoopConfig:
    """The sections of the configuration that the loop uses."""

    train: TrainConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    checkpoint: CheckpointConfig
    evaluate: EvaluateConfig
    log: LogConfig
    health: HealthConfig


@dataclass(frozen=True)
class _Recorded:
    """The last record of training."""

    step: int
    tokens: int
    time: float
    """s, monotonic."""


@dataclass(frozen=True)
class _Unchecked:
    """A step whose numbers are on their way to the host."""

    step: int
    numbers: AsyncRead
    """Its loss, and whether its update was skipped."""
    left_out: bool
    """is_spike left out the update."""


@dataclass
class Session:
    """One training run on one rank: its parts, built by launch/session.py, and the operations of the loop."""

    settings: LoopConfig
    engine: Engine
    mesh: Mesh
    batches: Callable[[int], Sequence[MicroBatch]]
    """By the number of the global batch, as `batch_tokens`."""
    batch_tokens: Callable[[int], int]
    """Target tokens of a global batch, over all ranks."""
    evaluate: Callable[[State], None]
    diagnose: Callable[[State], None]
    decompose: Callable[[State], None]
    checkpoints: Checkpoints
    metrics: Metrics
    progress: Progress
    health: Health
    heartbeat: Heartbeat
    profile: Profile
    clock: Clock
    stop: StopVote
    meta: Callable[[State, dict[str, Any]], CheckpointMeta]
    """Makes the metadata of a checkpoint of a state; the dictionary is the loop's own part of it."""
    flops_per_token: Callable[[int], tuple[float, float]]
    """Operations per token of a global batch, with causal attention and with full attention counted."""
    peak_flops: float
    """Operations per second of all devices together."""
    data_changes: Sequence[int] = ()
    """Numbers of the batches with which the next phase of the curriculum begins, or rows have another length."""
    source: str = ""
    """The checkpoint that this run started from, optimizer included; empty if there is none."""
    rewinds: list[dict[str, Any]] = field(default_factory=list)
    """The health records of this run's rewinds."""
    evaluate_first: bool = False
    """Repeat the evaluations of the first state: a process of this run saved it and may have ended before they were done."""

    _unchecked: _Unchecked | None = field(default=None, init=False)
    """The newest step."""
    _last_record: _Recorded = field(default=_Recorded(0, 0, 0.0), init=False)

    def start(self, state: State) -> None:
        """Begin or continue at a state: start the clocks, and record again the later rewinds, since metrics.jsonl ends here."""
        for record in self.rewinds:
            if record["step"] > state.step:
                self.metrics.record(record)
        self._last_record = _Recorded(state.step, state.tokens, time.monotonic())
        self.heartbeat.begin(state.step)
        self.clock.start()

    def begin_update(self, state: State) -> None:
        """The update that follows this state begins."""
        self.heartbeat.begin(state.step + 1)
        self.profile.before(state.step)

    def learning_rate(self, state: State) -> float:
        """Learning rate of the update that follows this state."""
        return self.settings.optimizer.rate * multiplier(self.settings.schedule, state.step, self.settings.train.steps)

    def after(self, state: State) -> State:
        """The state after the update that follows this one."""
        return state.after(self.batch_tokens(state.batch))

    def is_spike(self, state: State, loss: Tensor) -> bool:
        """Whether to leave out the update because of its loss; waits for the loss only with health.spike_action = "skip"."""
        if self.settings.health.spike_action != "skip" or not self.settings.health.spike_sigmas:
            return False
        self.check_health(state)  # the window then holds every loss before this one, as it does after a resume
        return self.health.is_spike(loss)

    def finish_update(self, state: State, loss: Tensor, update: UpdateResult, left_out: bool) -> None:
        """The update that led to this state is made; send its numbers to the host, for the check after the next one.

        Args:
            left_out: is_spike left out the update.
        """
        self.heartbeat.beat()
        self._unchecked = _Unchecked(state.step, AsyncRead(loss, update.skipped), left_out)

    def check_health(self, state: State) -> State:
        """Apply the health rules to the newest step whose update is finished, once.

        Returns:
            `state`, or that of a checkpoint if the rules rewind the run.

        Raises:
            RunEnded: the rules end the run.
        """
        unchecked, self._unchecked = self._unchecked, None
        if unchecked is None:
            return state
        step, (loss, skipped) = unchecked.step, unchecked.numbers.read()
        verdict = self.health.check(step, loss, bool(skipped) and not unchecked.left_out)
        if verdict.what and verdict.action != "rewind":
            self.metrics.record(verdict.record(step))
        if verdict.what and verdict.action in ("go", "skip"):  # of a rewind or the end the outcome is printed
            self.progress.line(verdict.sentence)
        if verdict.action == "stop":
            raise RunEnded(verdict.sentence)
        return self._rewind(state, step, verdict) if verdict.action == "rewind" else state

    def _rewind(self, state: State, step: int, verdict: Verdict) -> State:
        self.checkpoints.drain()
        try:
            planned = self.settings.checkpoint.every_steps
            path, why = self.checkpoints.newest(planned) or self.source, "this run has no checkpoint to go back to"
        except ValueError as error:
            path, why = "", str(error)
        if not path:
            advice = "" if self.settings.checkpoint.every_steps else "; set checkpoint.every_steps"
            ended = Verdict("stop", verdict.what, f"step {step}: a spike, but {why}{advice}")
            self.metrics.record(ended.record(step))
            self.checkpoints.continue_from(None)  # it is missing or damaged
            raise RunEnded(ended.sentence)
        self.progress.line(verdict.sentence)
        saved, remembered = restore(self.engine, self.checkpoints, path)
        self.health.rewind(remembered)
        if any(saved.batch < batch <= state.batch for batch in self.data_changes):
            self.health.forget()
        self.metrics.truncate(saved.step)
        self.rewinds.append(verdict.record(step))
        self.checkpoints.rewind(SavedCheckpoint(saved.step, path))
        state = saved.with_batch(state.batch)
        self.progress.line(left_behind(state.step, state.batch))
        self.start(state)
        return state

    def handle_data_change(self, state: State) -> State:
        """Where the next batch is of other text or length, clear the loss window: a jump of the loss is then no spike."""
        if state.batch in self.data_changes:
            state = self.check_health(state)
            self.health.forget()
        return state

    def log(self, state: State, loss: Tensor, update: UpdateResult, learning_rate: float) -> None:
        """Write the record of the step just done; without collectives, and with a message where that fails."""
        try:
            self._record(state, loss, update, learning_rate)
        except Exception as error:
            traceback.print_exc()  # to the rank's log
            self.progress.line(
                f"step {state.step}: the record failed ({type(error).__name__}: {error}); training is not affected"
            )

    def _record(self, state: State, loss: Tensor, update: UpdateResult, learning_rate: float) -> None:
        seconds_by_part = self.clock.read()  # waits for the device: only then is the step over
        now, last = time.monotonic(), self._last_record
        steps, seconds = state.step - last.step, max(1e-9, now - last.time)
        speed = (state.tokens - last.tokens) / seconds
        causal, full = self.flops_per_token(state.batch - 1)
        self._last_record = _Recorded(state.step, state.tokens, now)
        total = sum(seconds_by_part.values()) or 1.0
        self.metrics.record(
            {
                "kind": "train",
                "step": state.step,
                "tokens": state.tokens,
                "loss": loss,
                "grad_norm": update.grad_norm,
                "learning_rate": learning_rate,
                "skipped": update.skipped,
                **update.logit_record(),
                **load_summary(update.loads),
                "tokens_per_second": speed,
                "tokens_per_second_per_device": speed / self.mesh.world.size,
                "step_seconds": seconds / steps,
                "mfu": speed * causal / self.peak_flops,
                "mfu_full": speed * full / self.peak_flops,
                "memory_bytes": peak_memory_bytes(self.mesh.device),
                **{f"{name}_share": part / total for name, part in seconds_by_part.items()},
            }
        )
        for record in load_records(update.loads, state.step):
            self.metrics.record(record)
        newest = self.checkpoints.complete
        safety = checkpoint_age(newest and (newest.step, newest.taken), now)
        self.progress.update(state.step, float(loss), speed, safety, state.batch - state.step)

    def save(self, state: State) -> None:
        """Write a checkpoint of this state, unless there is one.

        Raises:
            RunEnded: checkpoint.max_failures in a row could not be written.
        """
        if self.checkpoints.has(state.step):
            return
        self.metrics.flush()
        try:
            self.checkpoints.save(self.engine.shards(), self._meta(state))
        except OSError as error:
            raise RunEnded(str(error)) from error
        self.clock.mark("save")

    def save_final(self, state: State) -> SavedCheckpoint:
        """Save the last state and wait until it and all records are on storage.

        Raises:
            RunEnded: they cannot be saved.
        """
        self.metrics.flush()
        try:
            complete = self.checkpoints.save_final(self.engine.shards(), self._meta(state))
        except OSError as error:
            raise RunEnded("; ".join(text for text in (str(error), self.metrics.flush_or_rescue()) if text)) from error
        if lost := self.metrics.flush_or_rescue():
            raise RunEnded(f"step {state.step}: {lost}")
        return complete

    def _meta(self, state: State) -> CheckpointMeta:
        later = [record for record in self.rewinds if record["step"] > state.step]
        health = {**self.health.state(), "later_rewinds": later}
        return self.meta(state, {"batch": state.batch, "health": health, "lineage": self.checkpoints.lineage.record()})

    def wait_for_checkpoint_copy(self) -> None:
        """Before the update: wait until the save in flight has copied what that changes."""
        wait_for_copy("update", self.checkpoints, self.clock)

    def run_evaluations(self, state: State, last: bool) -> None:
        """The diagnostics and the evaluation, where they are due after this step."""
        if due(state.step, self.settings.log.attention_every_steps):
            self.diagnose(state)
        if due(state.step, self.settings.log.spectrum_every_steps):
            self.decompose(state)
        if due(state.step, self.settings.evaluate.every_steps) or last:
            self.evaluate(state)

    def compare_replicas(self, state: State) -> None:
        """Check that ranks which share weights hold the same bits.

        Raises:
            RunEnded: they do not.
        """
        divergence = replica_divergence(self.engine.model, self.mesh)
        if divergence is not None:
            raise RunEnded(f"step {state.step}: {divergence}")


def restore(engine: Engine, checkpoints: Checkpoints, path: str) -> tuple[State, Mapping[str, Any]]:
    """Load a checkpoint into the engine; the state that was saved, and what the run remembered beside it (Session._meta)."""
    meta = checkpoints.load(path, engine.shards())
    engine.loaded(meta.step)
    # an older tiglon saved the losses of Health alone
    return State(meta.step, meta.tokens, meta.extra.get("batch", meta.step)), meta.extra.get("health", meta.extra)


def restore_weights(engine: Engine, checkpoints: Checkpoints, path: str) -> None:
    """Load the weights of a checkpoint into the engine, for a new run."""
    checkpoints.load(path, engine.shards(), only=lambda name: name.startswith("weight/"))
    engine.loaded(0)


def step_hooks(stop: StopVote, checkpoints: Checkpoints, clock: Clock) -> StepHooks:
    """What an engine calls of a session's parts in the middle of a step."""
    return StepHooks(clock.mark, partial(stop.requested, wait=False), partial(wait_for_copy, "accumulate", checkpoints, clock))


def wait_for_copy(before: StepPart, checkpoints: Checkpoints, clock: Clock) -> None:
    """Wait until the save in flight has copied what this part of a step changes."""
    if checkpoints.wait_for_copy(before):
        clock.mark("save")


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this process: allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with open("/proc/self/status") as status:
        return next((int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM")), 0)
