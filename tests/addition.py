"""What is asked of an addition to the network or the optimizers, run in a tree that has it: python -m tests.addition JSON.

JSON is {"corpus": folder, "runs": folder, "overrides": [...]}. On the last line of the screen it prints, as JSON, by layout the
losses of an unbroken run and of one that is resumed from the checkpoint in its middle.
"""

import json
import sys
from pathlib import Path

from tests.combinations.run import Place, execute
from trainer.monitoring.records import read_records

RANKS, STEPS, MIDDLE = 2, 3, 2
SMALL = (
    "run.device=cpu",
    "data.tokenizer={corpus}/tokenizer", "data.train={corpus}/shards/train", "data.validation={corpus}/held-out/train",
    "model.hidden_size=32", "model.intermediate_size=64", "model.num_hidden_layers=2", "model.initializer_range=0.1",
    "model.vocab_size=512", "schedule.kind=constant", "schedule.warmup_steps=0", "optimizer.max_grad_norm=0",
    f"train.steps={STEPS}", "train.sequence_length=64", "train.global_batch_size=8", "train.micro_batch_size=2",
    "train.precision=fp32", f"checkpoint.every_steps={MIDDLE}", "evaluate.tokens=0", "log.every_steps=1",
    "log.sample_prompt=def ", "log.sample_tokens=8", "log.tensorboard=false",
)  # fmt: skip
"""The shipped quickstart made small, with two micro-batches per rank."""
LAYOUTS = {
    "ZeRO 1": ("parallel.zero_stage=1",),
    "ZeRO 3": ("parallel.zero_stage=3",),
    "fold": ("parallel.engine=fold",),
    "tensor parallel 2": ("parallel.tensor_parallel_size=2",),
}
"""Each on two ranks."""


def losses(place: Place, overrides: list[str], run: str) -> dict[int, float]:
    """By step, of a run of its own directory.

    Raises:
        SystemExit: it did not end as it should; with what it said.
    """
    ending = execute(place.fill(overrides, run), RANKS)
    if fault := ending.fault():
        raise SystemExit(f"{run}: {fault}")
    records = read_records(ending.directory / "metrics.jsonl")
    return {record["step"]: record["loss"] for record in records if record["kind"] == "train"}


def main(asked: dict) -> dict[str, dict[str, dict[int, float]]]:
    """Losses of "whole" and "resumed" runs by layout."""
    place, found = Place(Path(asked["corpus"]), "", Path(asked["runs"])), {}
    for number, (layout, how) in enumerate(LAYOUTS.items()):
        overrides = [*SMALL, *how, *asked["overrides"]]
        whole = losses(place, overrides, f"whole-{number}")
        middle = place.runs / f"whole-{number}" / "checkpoints" / f"step-{MIDDLE:08d}"
        resumed = losses(place, [*overrides, f"checkpoint.resume={middle}"], f"resumed-{number}")
        found[layout] = {"whole": whole, "resumed": resumed}
    return found


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
