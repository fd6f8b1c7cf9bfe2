"""What a run observes while it trains: held-out loss, also at other contexts, a sample of its text, and its attention."""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import torch

from data.corpus.validation import Validation
from data.tokenizer.tokenizer import Tokenizer
from launch.config import RunConfig
from launch.isolation import ATTENTION, SAMPLE, VALIDATION, ObservationRunner, at_context
from model.diagnostics import AttentionStatistics, attention_statistics
from model.generate import Sampling, generate
from trainer.evaluate import Score, evaluate, evaluate_context
from trainer.session import Session
from trainer.state import State


def make_evaluator(
    config: RunConfig, session: Session, validation: Validation | None, runner: ObservationRunner
) -> Callable[[State], None]:
    """The loop's `evaluate`: every rank calls it, rank 0 writes. Without validation data only the sample is made."""
    tokenizer = Tokenizer.load(config.data.tokenizer) if config.log.sample_prompt else None

    def observe(state: State) -> None:
        step = state.step
        if validation is not None:
            evaluate_held_out(config, session, validation, runner, step)
        if tokenizer is not None:
            write = partial(_write_sample, session, step)
            runner.run(step, SAMPLE, partial(sample, config, session, tokenizer), write)
        session.clock.mark("evaluate")

    return observe


def evaluate_held_out(
    config: RunConfig, session: Session, validation: Validation, runner: ObservationRunner, step: int
) -> None:  # fmt: skip
    """The loss of the validation text at the training length, then at each of the configured contexts."""
    options = (session.mesh, config.evaluate.position, partial(session.watchdog.beat, step))
    model = session.engine.model
    compute = partial(evaluate, model, validation.whole(), *options)
    runner.run(step, VALIDATION, compute, partial(_write_score, session, step, "validation"))
    for context in sorted(config.evaluate.contexts):
        compute = partial(evaluate_context, model, validation.at(context), *options)
        runner.run(step, at_context(context), compute, partial(_write_score, session, step, "contexts"))


def _write_score(session: Session, step: int, name: str, score: Score) -> None:
    session.metrics.record(score.record(step, name))
    session.progress.line(f"step {step}: {name} loss {score.loss:.4f} at context {score.context}")


def _write_sample(session: Session, step: int, text: str) -> None:
    session.metrics.text("sample", text, step)


def make_diagnostic(session: Session, runner: ObservationRunner) -> Callable[[State], None]:
    """The loop's `diagnose`: entropy, concentration and largest logit of attention, one record per layer."""

    def compute(state: State) -> list[AttentionStatistics]:
        inputs_BS = session.batches(state.batch)[0].inputs_BS[:1].to(session.mesh.device)
        return attention_statistics(session.engine.model, inputs_BS, session.mesh)

    def write(step: int, layers: list[AttentionStatistics]) -> None:
        for layer, statistics in enumerate(layers):
            session.metrics.record({"kind": "attention", "step": step, "name": f"layer-{layer}", **asdict(statistics)})

    def diagnose(state: State) -> None:
        runner.run(state.step, ATTENTION, partial(compute, state), partial(write, state.step))

    return diagnose


@torch.no_grad()
def sample(config: RunConfig, session: Session, tokenizer: Tokenizer) -> str:
    """The prompt and the model's continuation; every rank takes part, as its weights may lie on all of them."""
    prompt = tokenizer.encode(config.log.sample_prompt)
    rows = generate(
        session.engine.model, [prompt], config.log.sample_tokens, Sampling(temperature=0.8, top_p=0.95),
        stop=tokenizer.end_of_text, vocabulary=tokenizer.vocab_size,
    )  # fmt: skip
    tokens = []
    for row in rows:
        tokens.append(row[0])
        session.watchdog.beat(session.current_update)
    return tokenizer.decode([*prompt, *(token for token in tokens if token is not None)])
