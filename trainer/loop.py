"""The training loop."""

import signal
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.parallel import Topology
from trainer.checkpoint import Checkpoints, Complete, load
from trainer.clock import Clock
from trainer.config import (
    CheckpointConfig,
    EvaluateConfig,
    HealthConfig,
    LogConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)
from trainer.engine import Batch, Engine
from trainer.health import Health, Verdict
from trainer.late import Late
from trainer.manifest import Meta
from trainer.metrics import Metrics
from trainer.optimizer import Update
from trainer.profile import Profile
from trainer.progress import Progress, saved
from trainer.replicas import divergence
from trainer.schedule import multiplier
from trainer.signals import StopSignal
from trainer.state import State, due
from trainer.watchdog import Watchdog


class RunEnded(Exception):
    """The run cannot go on; its one sentence says why."""


@dataclass(frozen=True)
class Settings:
    """The sections of the configuration that the loop obeys."""

    train: TrainConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    checkpoint: CheckpointConfig
    evaluate: EvaluateConfig
    log: LogConfig
    health: HealthConfig


@dataclass
class Run:
    """The parts of a run, built by launch/train.py, and the verbs of the loop."""

    settings: Settings
    engine: Engine
    topology: Topology
    batches: Callable[[int], Sequence[Batch]]
    evaluate: Callable[[State], None]
    diagnose: Callable[[State], None]
    checkpoints: Checkpoints
    metrics: Metrics
    progress: Progress
    health: Health
    watchdog: Watchdog
    profile: Profile
    clock: Clock
    stop: StopSignal
    meta: Callable[[State, dict[str, Any]], Meta]
    """The meta data of a checkpoint of a state; the dictionary is the loop's own part of it."""
    flops_per_token: tuple[float, float]
    """Causal and full attention counted."""
    peak_flops: float
    """Of all devices together (operations a second)."""
    new_data: Sequence[int] = ()
    """Numbers of the batches from which on the data are others, as planned."""
    source: str = ""
    """The checkpoint that this run began from, with its optimizer; empty if there is none."""

    rewinds: list[dict[str, Any]] = field(default_factory=list)
    """The health records of this run's rewinds."""

    look_again: bool = False
    """The state begun with was saved by this run, which may not have come to look at it."""

    _question: Late | None = field(default=None, init=False)
    _judged: tuple[int, Late, bool] | None = field(default=None, init=False)
    _logged: tuple[int, float] = field(default=(0, 0.0), init=False)
    at: int = field(default=0, init=False)
    """The update that is being made."""

    def learning_rate(self, state: State) -> float:
        """Of the update that follows this state."""
        return self.settings.optimizer.rate * multiplier(self.settings.schedule, state.step, self.settings.train.steps)

    def asked_to_stop(self, at_once: bool = True) -> bool:
        """Whether any rank heard a stop signal; every rank asks at the same moments and gets the same answer.

        The answer is that of the question before, so that nobody is waited for; on CPUs, `at_once`, that of this one.
        """
        if self.topology.world_group is None:
            return self.stop.requested is not None
        heard = torch.full((), float(self.stop.number), device=self.topology.device)
        work = dist.all_reduce(heard, op=dist.ReduceOp.MAX, group=self.topology.world_group, async_op=True)
        before, self._question = self._question, Late(heard, work=work)
        question = self._question if at_once and not heard.is_cuda else before
        number = int(question.read()[0]) if question is not None else 0
        if number:
            self.stop.request(signal.Signals(number).name)
        return number > 0

    def too_high(self, state: State, loss: Tensor) -> bool:
        """Whether the update is to be left out because of its loss (waits for the loss, only where this is asked for)."""
        if self.settings.health.spike_action != "skip" or not self.settings.health.spike_sigmas:
            return False
        self.judge(state, None, None, False)  # the window then holds every loss before this one, also after a resume
        return self.health.is_spike(loss)

    def judge(self, state: State, loss: Tensor | None, update: Update | None, left_out: bool) -> State:
        """Look at the step before this one, whose numbers have arrived by now; with None at the newest.

        Raises:
            RunEnded: the rules say so.
        """
        if self._judged is None:
            seen = None
        else:
            step, numbers, old_left_out = self._judged
            old_loss, skipped = numbers.read()
            seen = self.health.judge(step, old_loss, bool(skipped) and not old_left_out)
            if seen.what and seen.action != "rewind":
                self.metrics.record(seen.record(step))
            if seen.what and seen.action in ("go", "skip"):  # other answers are told when it is sure what becomes of them
                self.progress.line(seen.sentence)
        self._judged = None
        if loss is not None and update is not None:
            self._judged = (state.step, Late(loss, update.skipped), left_out)
        if seen is not None and seen.action == "stop":
            raise RunEnded(seen.sentence)
        if seen is not None and seen.action == "rewind":
            return self._rewind(state, step, seen)
        return state

    def _rewind(self, state: State, step: int, seen: Verdict) -> State:
        self.checkpoints.settle()
        try:
            planned = self.settings.checkpoint.every_steps
            path, why = self.checkpoints.newest(planned) or self.source, "this run has no checkpoint to go back to"
        except ValueError as error:
            path, why = "", str(error)
        if not path:
            advice = "" if self.settings.checkpoint.every_steps else "; set checkpoint.every_steps"
            ended = Verdict("stop", seen.what, f"step {step}: a spike, but {why}{advice}")
            self.metrics.record(ended.record(step))
            self.checkpoints.complete = None  # it is no longer there, or damaged
            raise RunEnded(ended.sentence)
        self.progress.line(seen.sentence)
        self._judged = None
        saved_at, remembered = self._load(path)
        self.health.rewind(remembered)
        if any(saved_at.batch < batch <= state.batch for batch in self.new_data):
            self.health.forget()
        self.metrics.back_to(saved_at.step)
        self.rewinds.append(seen.record(step))
        self.record_rewinds(saved_at.step)
        self.start(saved_at.reading_from(state.batch), path)
        self.checkpoints.go_back(saved_at.step)
        return saved_at.reading_from(state.batch)

    def record_rewinds(self, step: int) -> None:
        """Write down again the rewinds from later steps, which a metrics.jsonl up to this step lacks."""
        for record in self.rewinds:
            if record["step"] > step:
                self.metrics.record(record)

    def restore(self, path: str, weights_only: bool = False) -> State:
        """Fill the engine from a checkpoint; the state to go on from."""
        if weights_only:
            load(path, self.engine.shards(), only=lambda name: name.startswith("weight/"))
            self.engine.loaded(0)
            return State()
        state, remembered = self._load(path)
        self.health.resume(remembered)
        self.rewinds = list(remembered.get("later_rewinds", []))
        return state

    def _load(self, path: str) -> tuple[State, dict[str, Any]]:
        """Fill the engine; the state that was saved, and what health remembered then."""
        meta = load(path, self.engine.shards(), beat=lambda: self.watchdog.beat(self.at))
        self.engine.loaded(meta.step)
        # before health had more to remember, a checkpoint had its losses alone
        return State(meta.step, meta.tokens, meta.extra.get("batch", meta.step)), meta.extra.get("health", meta.extra)

    def meet(self, state: State) -> State:
        """Before the data change as planned: the loss may jump, which is no spike."""
        if state.batch in self.new_data:
            state = self.judge(state, None, None, False)
            self.health.forget()
        return state

    def log(self, state: State, loss: Tensor, update: Update, learning_rate: float) -> None:
        """One record of the step just done. It speaks to no other rank, and one that cannot be made is a message."""
        try:
            self._record(state, loss, update, learning_rate)
        except Exception as error:
            traceback.print_exc()  # to the rank's log
            self.progress.line(
                f"step {state.step}: the record failed ({type(error).__name__}: {error}); training is not affected"
            )

    def _record(self, state: State, loss: Tensor, update: Update, learning_rate: float) -> None:
        shares = self.clock.read()  # waits for the device: only then is the step over
        now, tokens = time.monotonic(), self.settings.train.batch_tokens
        steps = state.step - self._logged[0]
        seconds = max(1e-9, now - self._logged[1])
        speed = steps * tokens / seconds
        self._logged = (state.step, now)
        total = sum(shares.values()) or 1.0
        self.metrics.record(
            {
                "kind": "train",
                "step": state.step,
                "tokens": state.tokens,
                "loss": loss,
                "grad_norm": update.grad_norm,
                "learning_rate": learning_rate,
                "skipped": update.skipped,
                "tokens_per_second": speed,
                "tokens_per_second_per_device": speed / self.topology.world_size,
                "step_seconds": seconds / steps,
                "mfu": speed * self.flops_per_token[0] / self.peak_flops,
                "mfu_full": speed * self.flops_per_token[1] / self.peak_flops,
                "memory_bytes": memory_bytes(self.topology.device),
                **{f"{name}_share": part / total for name, part in shares.items()},
            }
        )
        newest = self.checkpoints.complete
        self.progress.update(state.step, float(loss), speed, saved(newest and (newest.step, newest.taken), now))

    def save(self, state: State) -> None:
        """Write a checkpoint of this state, unless there is one.

        Raises:
            RunEnded: too many in a row could not be written.
        """
        if self.checkpoints.has(state.step):
            return
        self.metrics.flush()
        try:
            self.checkpoints.save(self.engine.shards(), self._meta(state))
        except OSError as error:
            raise RunEnded(str(error)) from error
        self.clock.mark("save")

    def secure(self, state: State) -> Complete:
        """Return when this state and all records are safe; there is no later save.

        Raises:
            RunEnded: they cannot be saved.
        """
        self.metrics.flush()
        try:
            complete = self.checkpoints.secure(self.engine.shards(), self._meta(state))
        except OSError as error:
            raise RunEnded("; ".join(text for text in (str(error), self.metrics.secure()) if text)) from error
        if lost := self.metrics.secure():
            raise RunEnded(f"step {state.step}: {lost}")
        return complete

    def _meta(self, state: State) -> Meta:
        later = [record for record in self.rewinds if record["step"] > state.step]
        health = {**self.health.state(), "later_rewinds": later}
        return self.meta(state, {"batch": state.batch, "health": health, "life": self.checkpoints.life.record()})

    def release(self, steady: bool = True) -> None:
        """Before weights and states change: the save in flight must have its copy of them, steady or not."""
        if self.checkpoints.wait_for_copy(steady):
            self.clock.mark("save")

    def look(self, state: State, last: bool) -> None:
        """Whatever is to be looked at after this step."""
        if due(state.step, self.settings.log.attention_every_steps):
            self.diagnose(state)
        if due(state.step, self.settings.evaluate.every_steps) or last:
            self.evaluate(state)

    def compare_replicas(self, state: State) -> None:
        """End the run when ranks that should hold the same weights do not."""
        odd = divergence(self.engine.model, self.topology)
        if odd is not None:
            raise RunEnded(f"step {state.step}: {odd}")

    def start(self, state: State, path: str = "") -> None:
        """Set the clocks going, from the state of a checkpoint if there is one."""
        self._logged = (state.step, time.monotonic())
        self.checkpoints.complete = Complete(state.step, path) if path else None
        self.clock.start()


def train(run: Run, state: State) -> tuple[State, Complete]:
    """Train until the last step or until asked to stop; the state reached, and the checkpoint that holds it.

    Raises:
        RunEnded: with one sentence, when going on makes no sense, or the state reached cannot be saved.
    """
    every, settings = run.settings.log.every_steps, run.settings
    if run.look_again and state.step:
        run.look(state, state.step == settings.train.steps)
    while state.step < settings.train.steps and not run.asked_to_stop():
        state = run.meet(state)
        run.at = state.step + 1
        run.profile.before(state.step)
        learning_rate = run.learning_rate(state)
        batches = run.batches(state.batch)
        run.clock.mark("data")
        loss = run.engine.accumulate(batches)
        if loss is None:  # asked to stop between two micro-batches: the step has changed nothing yet and is dropped
            break
        left_out = run.too_high(state, loss)
        run.release()
        update = run.engine.update(learning_rate, left_out)
        run.clock.mark("optimizer")
        before, state = state, run.judge(state.after(settings.train.batch_tokens), loss, update, left_out)
        run.watchdog.beat(state.step)
        if state.step <= before.step:
            continue  # the run went back to a checkpoint
        last = state.step == settings.train.steps
        if due(state.step, every) or last or state.step == 1:
            run.log(state, loss, update, learning_rate)
        if due(state.step, settings.health.replica_check_every_steps):
            run.compare_replicas(state)
        if due(state.step, settings.checkpoint.every_steps) or last:
            reached, state = state, run.judge(state, None, None, False)
            if state.step < reached.step:
                continue  # this very step was a spike, and the run went back
            run.save(state)  # before anything is looked at: a look that fails then costs nothing
        run.look(state, last)
    state = run.judge(state, None, None, False)
    return state, run.secure(state)


def memory_bytes(device: torch.device) -> int:
    """Peak memory of this process: allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with open("/proc/self/status") as status:
        return next((int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM")), 0)
