"""What a run looks at while it trains: held-out loss, by context too, and a sample of its text."""

from collections.abc import Callable
from dataclasses import asdict

import torch

from data.stream import Stream
from data.tokenizer import Tokenizer
from launch.config import RunConfig
from model.diagnostics import look
from model.generate import Sampling, generate
from trainer.evaluate import Score, evaluate, evaluate_contexts
from trainer.loop import Run
from trainer.state import State

SAMPLE_TOKENS = 100


def observer(config: RunConfig, run: Run, stream: Stream | None) -> Callable[[State], None]:
    """The loop's `evaluate`: every rank calls it, rank 0 writes. Without a validation part only the sample is made."""
    tokenizer = Tokenizer.load(config.data.tokenizer) if config.log.sample_prompt else None

    def observe(state: State) -> None:
        if stream is not None:
            for name, score in held_out(config, run, stream):
                record = {"kind": "evaluate", "step": state.step, "name": name, "context": score.context, "loss": score.loss}
                run.metrics.record(record)
                run.progress.line(f"step {state.step}: {name} loss {score.loss:.4f} at context {score.context}")
                run.watchdog.beat(state.step)
        if tokenizer is not None:
            run.metrics.text("sample", sample(config, run, tokenizer), state.step)
        run.clock.mark("evaluate")

    return observe


def diagnoser(run: Run) -> Callable[[State], None]:
    """The loop's `diagnose`: entropy, concentration and largest logit of every layer's attention, one record a layer."""

    def diagnose(state: State) -> None:
        inputs_BS = run.batches(state.batch)[0].inputs_BS[:1].to(run.topology.device)
        for layer, seen in enumerate(look(run.engine.model, inputs_BS, run.topology)):
            run.metrics.record({"kind": "attention", "step": state.step, "name": f"layer-{layer}", **asdict(seen)})

    return diagnose


def held_out(config: RunConfig, run: Run, stream: Stream) -> list[tuple[str, Score]]:
    """Scores of the same validation batches each time, at the training length and at the configured contexts."""
    batches = [stream.batches(step) for step in range(config.evaluate.batches)]
    position, topology = config.evaluate.position, run.topology
    scores: list[tuple[str, Score]] = []
    if validation_length(config) == config.train.sequence_length:
        scores.append(("validation", evaluate(run.engine.model, batches, topology, position)))
    if config.evaluate.contexts:
        found = evaluate_contexts(run.engine.model, batches, sorted(config.evaluate.contexts), topology, position)
        scores += [("contexts", score) for score in found]
    return scores


@torch.no_grad()
def sample(config: RunConfig, run: Run, tokenizer: Tokenizer) -> str:
    """The prompt and what the network makes of it; every rank takes part, as its weights may lie on all of them."""
    prompt = tokenizer.encode(config.log.sample_prompt)
    made = generate(
        run.engine.model, [prompt], SAMPLE_TOKENS, Sampling(temperature=0.8, top_p=0.95), stop=tokenizer.end_of_text,
        pieces=tokenizer.vocab_size,
    )  # fmt: skip
    tokens = [row[0] for row in made]
    return tokenizer.decode([*prompt, *(token for token in tokens if token is not None)])


def validation_length(config: RunConfig) -> int:
    """Tokens of a validation sequence: the training length, or the longest context to be scored."""
    return max([config.train.sequence_length, *config.evaluate.contexts])
