"""What a run looks at while it trains: held-out loss, by context too, a sample of its text, and its attention."""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import torch

from data.tokenizer import Tokenizer
from data.validation import Validation
from launch.config import RunConfig
from launch.looks import ATTENTION, SAMPLE, VALIDATION, Looks, at_context
from model.diagnostics import Look, look
from model.generate import Sampling, generate
from trainer.evaluate import Score, evaluate, evaluate_context
from trainer.loop import Run
from trainer.state import State


def observer(config: RunConfig, run: Run, validation: Validation | None, looks: Looks) -> Callable[[State], None]:
    """The loop's `evaluate`: every rank calls it, rank 0 writes. Without a validation part only the sample is made."""
    tokenizer = Tokenizer.load(config.data.tokenizer) if config.log.sample_prompt else None

    def observe(state: State) -> None:
        step = state.step
        if validation is not None:
            held_out(config, run, validation, looks, step)
        if tokenizer is not None:
            make, write = partial(sample, config, run, tokenizer), partial(_write_sample, run, step)
            looks.attempt(step, SAMPLE, make, write)
        run.clock.mark("evaluate")

    return observe


def held_out(config: RunConfig, run: Run, validation: Validation, looks: Looks, step: int) -> None:
    """The loss of the validation text at the training length, then at each of the configured contexts."""
    how = (run.topology, config.evaluate.position, partial(run.watchdog.beat, step))
    model = run.engine.model
    make = partial(evaluate, model, validation.whole(), *how)
    looks.attempt(step, VALIDATION, make, partial(_write_score, run, step, "validation"))
    for context in sorted(config.evaluate.contexts):
        make = partial(evaluate_context, model, validation.at(context), *how)
        looks.attempt(step, at_context(context), make, partial(_write_score, run, step, "contexts"))


def _write_score(run: Run, step: int, name: str, score: Score) -> None:
    run.metrics.record(score.record(step, name))
    run.progress.line(f"step {step}: {name} loss {score.loss:.4f} at context {score.context}")


def _write_sample(run: Run, step: int, text: str) -> None:
    run.metrics.text("sample", text, step)


def diagnoser(run: Run, looks: Looks) -> Callable[[State], None]:
    """The loop's `diagnose`: entropy, concentration and largest logit of every layer's attention, one record a layer."""

    def see(state: State) -> list[Look]:
        inputs_BS = run.batches(state.batch)[0].inputs_BS[:1].to(run.topology.device)
        return look(run.engine.model, inputs_BS, run.topology)

    def write(step: int, found: list[Look]) -> None:
        for layer, seen in enumerate(found):
            run.metrics.record({"kind": "attention", "step": step, "name": f"layer-{layer}", **asdict(seen)})

    def diagnose(state: State) -> None:
        looks.attempt(state.step, ATTENTION, partial(see, state), partial(write, state.step))

    return diagnose


@torch.no_grad()
def sample(config: RunConfig, run: Run, tokenizer: Tokenizer) -> str:
    """The prompt and what the network makes of it; every rank takes part, as its weights may lie on all of them."""
    prompt = tokenizer.encode(config.log.sample_prompt)
    made = generate(
        run.engine.model, [prompt], config.log.sample_tokens, Sampling(temperature=0.8, top_p=0.95),
        stop=tokenizer.end_of_text, pieces=tokenizer.vocab_size,
    )  # fmt: skip
    tokens = []
    for row in made:
        tokens.append(row[0])
        run.watchdog.beat(run.at)
    return tokenizer.decode([*prompt, *(token for token in tokens if token is not None)])
