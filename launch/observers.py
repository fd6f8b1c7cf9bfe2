"""What a run observes while it trains: held-out loss, also at other contexts, a sample, attention and matrices."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from data.corpus.validation import Validation
from data.tokenizer.tokenizer import Tokenizer
from launch.config import RunConfig
from launch.isolation import ATTENTION, SAMPLE, SPECTRUM, VALIDATION, LeftForStop, ObservationRunner, at_context
from launch.long_contexts import forwards_at
from model.diagnostics import AttentionStatistics, attention_statistics
from model.generate import Sampling, generate
from model.parallel.mesh import Mesh
from model.parameters import MATRICES
from model.sizes import parameter_specs
from trainer.engines.base import MicroBatch
from trainer.evaluate import Score, evaluate, evaluate_context
from trainer.monitoring.clock import Clock
from trainer.monitoring.evaluation_progress import EvaluationProgress
from trainer.monitoring.metrics import Metrics
from trainer.monitoring.progress import Progress
from trainer.monitoring.signals import StopVote
from trainer.monitoring.spectrum import Spectrum, matrix_spectra
from trainer.monitoring.watchdog import Heartbeat
from trainer.optimizers.fragments import Fragment
from trainer.state import State


@dataclass(frozen=True)
class Observers:
    """The observations of one run. Every rank calls them, rank 0 writes."""

    config: RunConfig
    model: Any
    """The decoder, as the engine holds it."""
    fragments: Callable[[], list[Fragment]]
    """What this rank holds of every parameter."""
    mesh: Mesh
    batches: Callable[[int], Sequence[MicroBatch]]
    """The micro-batches of a global batch, by its number."""
    validation: Validation | None
    """Without it only the sample is made."""
    tokenizer: Tokenizer | None
    """Without it no sample is made."""
    metrics: Metrics
    progress: Progress
    heartbeat: Heartbeat
    stop: StopVote
    """Asked after every forward of an evaluation."""
    clock: Clock
    runner: ObservationRunner

    def evaluate(self, state: State) -> None:
        """Held-out losses and a sample of text (Session.evaluate)."""
        if self.validation is not None:
            self.evaluate_held_out(self.validation, state.step)
        if self.tokenizer is not None:
            compute = partial(sample, self.config, self.model, self.tokenizer, self.heartbeat.beat)
            self.runner.run(state.step, SAMPLE, compute, lambda text: self.metrics.text("sample", text, state.step))
        self.clock.mark("evaluate")

    def evaluate_held_out(self, validation: Validation, step: int) -> None:
        """The loss of the validation text at the training length, then at each of the configured contexts."""
        settings, beat = self.config.evaluate, partial(self._forward_done, step)
        compute = partial(evaluate, self.model, validation.whole(), self.mesh, settings.position, beat)
        self.runner.run(step, VALIDATION, compute, partial(self._write_score, step, "validation"))
        for context in sorted(settings.contexts):
            what = f"step {step}: {VALIDATION} at context {context:,}"
            forwards = forwards_at(validation, context, settings.chunk_tokens)
            read = EvaluationProgress(what, forwards, self.progress.line, beat)
            options = (self.mesh, settings.position, read, settings.chunk_tokens)
            compute = partial(evaluate_context, self.model, validation.at(context), *options)
            self.runner.run(step, at_context(context), compute, partial(self._write_score, step, "contexts"))

    def _forward_done(self, step: int) -> None:
        """After a forward of an evaluation: the process is alive. Raises LeftForStop where the run is asked to stop before its
        last step; after it nothing is left but to evaluate."""
        self.heartbeat.beat()
        if step < self.config.train.steps and self.stop.requested():
            raise LeftForStop

    def _write_score(self, step: int, name: str, score: Score) -> None:
        self.metrics.record(score.record(step, name))
        self.progress.line(f"step {step}: {name} loss {score.loss:.4f} at context {score.context:,}")

    def diagnose(self, state: State) -> None:
        """Entropy, concentration and largest logit of attention, one record per layer (Session.diagnose)."""

        def compute() -> list[AttentionStatistics]:
            inputs_BS = self.batches(state.batch)[0].inputs_BS[:1].to(self.mesh.device)
            return attention_statistics(self.model, inputs_BS, self.mesh)

        def write(layers: list[AttentionStatistics]) -> None:
            for layer, statistics in enumerate(layers):
                record = {"kind": "attention", "step": state.step, "name": f"layer-{layer}", **asdict(statistics)}
                self.metrics.record(record)

        self.runner.run(state.step, ATTENTION, compute, write)

    def decompose(self, state: State) -> None:
        """Entropy of the singular values and the largest of every matrix, one record each (Session.decompose)."""

        def write(spectra: dict[str, Spectrum]) -> None:
            for name, spectrum in spectra.items():
                self.metrics.record({"kind": "spectrum", "step": state.step, "name": name, **asdict(spectrum)})

        limit = self.config.parallel.reduce_bucket_elements
        names = [name for name, spec in parameter_specs(self.config.model).items() if spec.kind in MATRICES]
        compute = partial(matrix_spectra, self.fragments(), names, self.mesh, limit, self.heartbeat.beat)
        self.runner.run(state.step, SPECTRUM, compute, write)


@torch.no_grad()
def sample(config: RunConfig, model: Any, tokenizer: Tokenizer, beat: Callable[[], None]) -> str:
    """The prompt and the model's continuation; every rank takes part, as its weights may lie on all of them."""
    prompt = tokenizer.prompt(config.log.sample_prompt)
    rows = generate(
        model, [prompt], config.log.sample_tokens, Sampling(temperature=0.8, top_p=0.95, never=tokenizer.unused_ids()),
        stop=tokenizer.end_tokens, vocabulary=tokenizer.vocab_size,
    )  # fmt: skip
    tokens = []
    for row in rows:
        tokens.append(row[0])
        beat()
    return tokenizer.decode([*prompt, *(token for token in tokens if token is not None)])
