"""An imported model trains as transformers' does: AdamW from the import, in every layout, against transformers' own network
and gradients and torch's AdamW on the same batches.

One case here; all: pytest -m slow tests/families/test_training.py. The figures: -s
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data.corpus.stream import Stream
from launch.inputs import batch_shape
from launch.load_config import load_config
from tests.combinations import corpus as shards
from tests.combinations.run import rank_main
from tests.families.imported import import_case, saved, stock_names
from tests.model.huggingface.stock import ALL, CASES, Case, stock_model
from tests.ranks import run_ranks
from trainer.monitoring.records import read_records

STEPS = 3
RATE, DECAY, BETAS, EPS = 1e-2, 0.1, (0.9, 0.95), 1e-3
"""A rate that moves the weights by a tenth, and an eps at which the size of a gradient shows in the step."""
CLOSE = {"loss": 5e-6, "gradient norm": 1e-4, "weights": 3e-4}
"""Relative differences at most; of weights relative to how far each tensor moved."""
STILL = 1e-3
"""Of RATE: a tensor whose elements moved by less (RMS) has a gradient that is zero but for rounding, as the biases of keys that
are not rotated, which add the same to all scores of a query. Its difference counts relative to RATE."""
OVERRIDES = (
    f"train.steps={STEPS}", "train.sequence_length=48", "train.global_batch_size=4", "train.micro_batch_size=2",
    "train.precision=fp32", "optimizer.name=adamw", f"optimizer.adamw.learning_rate={RATE}",
    f"optimizer.adamw.weight_decay={DECAY}", f"optimizer.adamw.betas={list(BETAS)}", f"optimizer.adamw.eps={EPS}",
    "optimizer.max_grad_norm=0", "schedule.kind=constant", "schedule.warmup_steps=0", "checkpoint.reset_optimizer=true",
    "checkpoint.asynchronous=false", "run.device=cpu", "log.every_steps=1", "log.tensorboard=false",
    "model.router_bias_rate=0",  # transformers leaves the biases of routers where they are
)  # fmt: skip
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one rank": (1, ()),
    "tensor parallel": (2, ("parallel.tensor_parallel_size=2",)),
    "sequence parallel": (
        2, ("parallel.tensor_parallel_size=2", "parallel.sequence_parallel=true", "train.recompute=selective"),
    ),
    "zero 3": (2, ("parallel.zero_stage=3",)),
    "compiled": (1, ("train.compile=true",)),
}  # fmt: skip
"""Ranks and overrides by name."""


def layouts_of(case: Case) -> list[str]:
    """Every layout for the first case of a family, one for each of the others; compiled is one case alone, for time. One
    key-value head, which both ranks compute, takes other collectives with and without sequence parallelism."""
    if case.name == next(iter(CASES[case.family])):
        return [name for name in LAYOUTS if name != "compiled" or case.family == "gemma3_text"]
    return ["sequence parallel"] if case.settings["num_key_value_heads"] > 1 else ["sequence parallel", "tensor parallel"]


@dataclass
class Course:
    """What training came to."""

    losses: list[float] = field(default_factory=list)
    """Nats per token, of each step."""
    gradient_norms: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    """By their names in the network, after the last step."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards and their tokenizer."""
    folder = tmp_path_factory.mktemp("corpus")
    shards.make(folder)
    return folder


def train_ours(arguments: list[str], ranks: int, run: Path) -> Course:
    """A run as a user starts it."""
    statuses = run_ranks(rank_main, ranks, arguments, f"{run}.screen", grouped=False, timeout_seconds=250)
    assert statuses == [0] * ranks, Path(f"{run}.screen-0").read_text()
    records = [record for record in read_records(run / "metrics.jsonl") if record["kind"] == "train"]
    return Course(
        [record["loss"] for record in records],
        [record["grad_norm"] for record in records],
        saved(run / "checkpoints" / f"step-{STEPS:08d}"),
    )


def train_stock(case: Case, model: Any, arguments: list[str]) -> Course:
    """transformers' network by torch's AdamW, which decays neither gains nor biases, on the batches of the run."""
    config = load_config(arguments[0], arguments[1:])
    stream = Stream(
        config.data.model_copy(update={"prefetch_steps": 0}), "train", batch_shape(config.train), 0, 1, config.run.seed
    )
    still = [p for name, p in model.named_parameters() if "norm" in name or name.endswith(".bias")]
    known = {id(parameter) for parameter in still}
    decaying = [p for p in model.parameters() if id(p) not in known]
    groups = [{"params": decaying, "weight_decay": DECAY}, {"params": still, "weight_decay": 0.0}]
    optimizer, course = torch.optim.AdamW(groups, lr=RATE, betas=BETAS, eps=EPS), Course()
    for step in range(STEPS):
        batches = stream.batches(step)
        count = sum(int((batch.targets_BS != -100).sum()) for batch in batches)
        losses = []
        for batch in batches:
            logits = model(batch.inputs_BS, use_cache=False).logits
            losses.append(F.cross_entropy(logits.flatten(0, 1), batch.targets_BS.flatten(), reduction="sum") / count)
            losses[-1].backward()
        course.losses.append(sum(loss.item() for loss in losses))
        norms = [p.grad.double().norm() for p in model.parameters() if p.grad is not None]
        course.gradient_norms.append(torch.stack(norms).norm().item())
        optimizer.step()
        optimizer.zero_grad()
    stream.close()
    biases = {name: bias for name, bias in model.named_buffers() if name.endswith("e_score_correction_bias")}
    course.weights = stock_names(case, {name: p.detach() for name, p in model.named_parameters()} | biases)
    return course


def differences(ours: Course, theirs: Course, before: dict[str, Tensor]) -> dict[str, float]:
    """The largest relative differences, by what CLOSE calls them."""
    assert ours.weights.keys() == theirs.weights.keys() == before.keys()
    assert len(ours.losses) == len(theirs.losses) == len(ours.gradient_norms) == STEPS
    return {
        "loss": max(abs(one / other - 1) for one, other in zip(ours.losses, theirs.losses)),
        "gradient norm": max(abs(one / other - 1) for one, other in zip(ours.gradient_norms, theirs.gradient_norms)),
        "weights": max(_moved_apart(ours.weights[name], theirs.weights[name], before[name]) for name in before),
    }


def _moved_apart(one: Tensor, other: Tensor, before: Tensor) -> float:
    moved, apart = ((other - each).square().mean().sqrt().item() for each in (before, one))
    return apart / (moved if moved > STILL * RATE else RATE)


def check_training(case: Case, layout: str, corpus: Path, folder: Path) -> None:
    if layout == "compiled" and shutil.which("g++") is None:
        pytest.skip("needs a C++ compiler")
    ranks, overrides = LAYOUTS[layout]
    imported = import_case(case, folder, vocab_size=shards.VOCABULARY)
    arguments = [
        str(imported.checkpoint / "config.toml"), f"run.dir={folder}/run", f"data.train={corpus}/shards/train",
        f"data.tokenizer={corpus}/tokenizer", f"checkpoint.resume={imported.checkpoint}", *OVERRIDES, *overrides,
    ]  # fmt: skip
    before = saved(imported.checkpoint)
    ours = train_ours(arguments, ranks, folder / "run")
    theirs = train_stock(case, stock_model(case, vocab_size=shards.VOCABULARY), arguments)
    found = differences(ours, theirs, before)
    print(f"\n{case}, {layout}: " + ", ".join(f"{what} off by {error:.1e}" for what, error in found.items()))
    assert not {what: error for what, error in found.items() if not error < CLOSE[what]}


def test_training_is_that_of_transformers(corpus: Path, tmp_path: Path):
    check_training(Case("llama", "biases"), "one rank", corpus, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case, layout", [(case, layout) for case in ALL for layout in layouts_of(case)], ids=str)
def test_every_family_trains_in_every_layout(case: Case, layout: str, corpus: Path, tmp_path: Path):
    check_training(case, layout, corpus, tmp_path)
