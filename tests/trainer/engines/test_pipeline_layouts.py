"""One loss curve, however the layers of a network are cut into stages: pipelines against one process without any.

Every pair of values meets: ranks of the pipeline, tensor and data ranks, engine, schedule, micro-batches.
"""

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch

from launch.config import RunConfig
from launch.engine import build_engine
from launch.load_config import build_config
from launch.resolve import resolve
from model.parallel.mesh import make_mesh
from tests.ranks import run_ranks

LAYERS, VOCABULARY, LENGTH, STEPS, LIMIT = 8, 64, 16, 6, 0.05
OPTIMIZERS = {"zero1": ("adamw", 1e-3), "zero2": ("lion", 1e-3), "fold": ("tiger", 1e-2)}
"""Rule and rate, by engine; those of ZeRO clip at LIMIT, which every gradient exceeds."""


@dataclass(frozen=True)
class Layout:
    """How ranks share an update of `micro_batches` x `data` sequences."""

    pipeline: int
    tensor: int
    data: int
    engine: str
    schedule: Literal["1f1b", "interleaved"]
    micro_batches: int
    tied: bool = True
    precision: Literal["fp32", "bf16"] = "fp32"

    @property
    def ranks(self) -> int:
        return self.pipeline * self.tensor * self.data

    @property
    def alone(self) -> "Layout":
        """One process that makes the same updates."""
        return replace(self, pipeline=1, tensor=1, data=1, schedule="1f1b", micro_batches=self.micro_batches * self.data)

    @property
    def knows_norm(self) -> bool:
        """Whether the gradient norm is that of one process: fold takes a tied embedding's two gradients for two."""
        return self.engine != "fold" or not self.tied

    def config(self) -> RunConfig:
        name, rate = OPTIMIZERS[self.engine]
        parallel = {"engine": "fold"} if self.engine == "fold" else {"zero_stage": int(self.engine[-1])}
        return build_config({
            "model": {
                "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS,
                "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": self.tied,
            },
            "train": {
                "precision": self.precision, "sequence_length": LENGTH, "micro_batch_size": 1,
                "global_batch_size": self.micro_batches * self.data,
            },
            "optimizer": {
                "name": name, name: {"learning_rate": rate}, "max_grad_norm": 0.0 if self.engine == "fold" else LIMIT,
            },
            "parallel": {
                **parallel, "tensor_parallel_size": self.tensor, "pipeline_parallel_size": self.pipeline,
                "pipeline_schedule": self.schedule,
            },
        })  # fmt: skip


def micro_batches(layout: Layout, step: int, rank: int) -> list[Any]:
    """Of a data-parallel rank; a row of the global batch leaves its number of targets unscored."""
    count = layout.micro_batches * layout.data
    drawn = torch.randint(VOCABULARY, (count, LENGTH + 1), generator=torch.Generator().manual_seed(step))
    inputs, targets = drawn[:, :-1], drawn[:, 1:].clone()
    for row in range(count):
        targets[row, : row % 5] = -100
    own = range(rank * layout.micro_batches, (rank + 1) * layout.micro_batches)
    return [SimpleNamespace(inputs_BS=inputs[[row]], targets_BS=targets[[row]], cu_seqlens=None) for row in own]


def curves(rank: int, world_size: int, layouts: list[Layout]) -> dict[Layout, list[tuple[float, float]]]:
    """Loss and gradient norm of every step."""
    found = {}
    for layout in layouts:
        mesh = make_mesh(layout.tensor, torch.device("cpu"), pipeline_parallel_size=layout.pipeline)
        config = layout.config()
        engine = build_engine(resolve(config, world_size, mesh.device), mesh)
        curve = []
        for step in range(STEPS):
            loss = engine.accumulate(micro_batches(layout, step, mesh.data.rank))
            assert loss is not None
            curve.append((loss.item(), engine.update(config.optimizer.rate).grad_norm.item()))
        engine.close()
        found[layout] = curve
    return found


def by_ranks(layouts: list[Layout]) -> dict[int, list[Layout]]:
    """Layouts by the number of their ranks."""
    return {size: [one for one in layouts if one.ranks == size] for size in sorted({one.ranks for one in layouts})}


def measured(layouts: list[Layout]) -> dict[Layout, list[torch.Tensor]]:
    """The curve that each rank has seen, float64 [STEPS, 2]: losses and gradient norms."""
    found: dict[Layout, list[torch.Tensor]] = {}
    for size, chosen in by_ranks(layouts).items():
        answers = run_ranks(curves, size, chosen, timeout_seconds=280)
        found |= {each: [torch.tensor(answer[each], dtype=torch.float64) for answer in answers] for each in chosen}
    return found


def deviations(layouts: list[Layout]) -> dict[Layout, float]:
    """Largest relative difference from one process, over steps and ranks, of the losses and of the norms that are known.

    Raises:
        AssertionError: a gradient was not clipped where it should have been.
    """
    alone = {one: curve[0] for one, curve in measured([*{layout.alone: None for layout in layouts}]).items()}
    for one, curve in alone.items():
        assert one.engine == "fold" or curve[:, 1].min() > LIMIT, f"{one} does not clip: {curve[:, 1]}"
    found = {}
    for layout, answers in measured(layouts).items():
        want = alone[layout.alone]
        worst = torch.stack([((got - want) / want).abs() for got in answers]).amax((0, 1))
        found[layout] = worst[: 1 + layout.knows_norm].max().item()
    return found


FEW = [Layout(2, 1, 1, "zero1", "1f1b", 4), Layout(2, 1, 1, "fold", "interleaved", 4)]
PAIRS = [
    Layout(2, 1, 1, "zero1", "interleaved", 16),
    Layout(2, 2, 2, "zero2", "1f1b", 4),
    Layout(2, 1, 3, "fold", "1f1b", 16, tied=False),
    Layout(4, 2, 1, "fold", "interleaved", 4),
    Layout(4, 1, 2, "zero1", "1f1b", 16),
    Layout(4, 1, 3, "zero2", "interleaved", 4),
    Layout(2, 2, 3, "zero1", "1f1b", 4),
    Layout(2, 1, 2, "fold", "interleaved", 16),
    Layout(4, 2, 1, "zero2", "1f1b", 16),
    Layout(4, 1, 1, "fold", "1f1b", 4, tied=False),
]
"""Every pair of values of the first six fields."""
ROUNDED = [
    Layout(2, 1, 1, "zero1", "1f1b", 4, precision="bf16"),
    Layout(4, 1, 2, "zero2", "interleaved", 4, precision="bf16"),
    Layout(2, 2, 1, "fold", "interleaved", 4, precision="bf16"),
    Layout(4, 1, 1, "fold", "1f1b", 16, precision="bf16"),
]


def test_a_pipeline_of_two_trains_as_one_process_does():
    found = deviations(FEW)
    assert max(found.values()) < 1e-5, found


def test_every_pair_of_values_occurs():
    values = [[(i, value) for i, value in enumerate(_six(layout))] for layout in PAIRS]
    every = [{row[i] for row in values} for i in range(6)]
    wanted = {(a, b) for i in range(6) for j in range(i) for a in every[j] for b in every[i]}
    assert {(row[j], row[i]) for row in values for i in range(6) for j in range(i)} == wanted


def _six(layout: Layout) -> tuple[Any, ...]:
    return layout.pipeline, layout.tensor, layout.data, layout.engine, layout.schedule, layout.micro_batches


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_pair_of_values_trains_as_one_process_does():
    found = deviations(PAIRS)
    assert max(found.values()) < 1e-5, found


@pytest.mark.slow
def test_in_bf16_a_pipeline_is_as_near_to_float32_as_one_process_is():
    whole = {layout: replace(layout.alone, precision="fp32") for layout in ROUNDED}
    alone = measured([*{each: None for layout in ROUNDED for each in (layout.alone, whole[layout])}])
    for layout, answers in measured(ROUNDED).items():
        exact = alone[whole[layout]][0][:, 0]
        off, one = ((curve[:, 0] - exact).abs().max().item() for curve in (answers[0], alone[layout.alone][0]))
        assert off < 3 * one, f"{layout}: {off:.1e}, one process {one:.1e}"
