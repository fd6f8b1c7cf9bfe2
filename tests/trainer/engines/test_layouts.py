"""One loss curve, however ranks share the work: DeepSpeed ZeRO and Megatron against one process and torch's AdamW."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from model.config import ModelConfig
from model.decoder import Decoder
from model.initialization import initialise
from model.parallel.layers import serial_kit
from model.parallel.mesh import make_kit, make_mesh
from model.positions.config import PositionConfig
from tests.ranks import run_ranks
from tests.trainer.rules import optimizer
from trainer.config import ParallelConfig, TrainConfig
from trainer.engines.zero import Zero

MODEL = ModelConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
)
OPTIMIZER = optimizer(name="adamw", learning_rate=1e-2, weight_decay=0.1, max_grad_norm=1.0)
SEQUENCES, LENGTH, STEPS = 8, 16, 10
SLOW = pytest.mark.slow


def rows(step: int) -> torch.Tensor:
    """The global batch of a step, with some targets that are not scored, unevenly over its rows."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, 64, (SEQUENCES, LENGTH + 1), generator=generator)


def targets(tokens: torch.Tensor, first: int) -> torch.Tensor:
    wanted = tokens[:, 1:].clone()
    for row in range(len(wanted)):
        wanted[row, : (first + row) % 5] = -100
    return wanted


def reference() -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step in one process, with torch alone."""
    model = Decoder(MODEL, PositionConfig(), LENGTH, serial_kit())
    initialise(model, 0)
    small = [p for p in model.parameters() if p.ndim == 1]
    large = [p for p in model.parameters() if p.ndim > 1]
    groups = [{"params": large, "weight_decay": 0.1}, {"params": small, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    curve = []
    for step in range(STEPS):
        tokens = rows(step)
        logits = model(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets(tokens, 0).flatten(), ignore_index=-100)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        curve.append((loss.item(), norm.item()))
    return curve


def micro_batches(step: int, rank: int, ranks: int, count: int) -> list[SimpleNamespace]:
    share = SEQUENCES // ranks
    tokens = rows(step)[rank * share : (rank + 1) * share]
    wanted = targets(tokens, rank * share)
    pairs = zip(tokens[:, :-1].chunk(count), wanted.chunk(count), strict=True)
    return [SimpleNamespace(inputs_BS=i.contiguous(), targets_BS=t.contiguous(), cu_seqlens=None) for i, t in pairs]


def curves(
    rank: int, world_size: int, tensor_parallel_size: int, sequence_parallel: bool, context: int, exchange: Any
) -> dict[str, list[tuple[float, float]]]:
    mesh = make_mesh(tensor_parallel_size, torch.device("cpu"), context_parallel_size=context)
    found = {}
    for stage in (1, 2, 3):
        for count in (1, 2):
            model = Decoder(MODEL, PositionConfig(), LENGTH, make_kit(mesh, sequence_parallel, context_exchange=exchange))
            initialise(model, 0)
            size = SEQUENCES // mesh.data.size // count
            parallel = ParallelConfig(
                tensor_parallel_size=tensor_parallel_size, sequence_parallel=sequence_parallel, zero_stage=stage
            )
            train = TrainConfig(precision="fp32", global_batch_size=SEQUENCES, micro_batch_size=size)
            engine = Zero(model, parallel, OPTIMIZER, train, mesh, rms_floor={})
            curve = []
            for step in range(STEPS):
                batches = micro_batches(step, mesh.data.rank, mesh.data.size, count)
                loss = engine.accumulate(batches)
                curve.append((loss.item(), engine.update(1e-2).grad_norm.item()))
            engine.close()
            found[f"stage {stage}, {count} micro-batches"] = curve
    return found


@pytest.mark.parametrize(
    ("world_size", "tensor_parallel_size", "sequence_parallel", "context", "exchange"),
    [
        (1, 1, False, 1, "gather"), (2, 1, False, 1, "gather"), (2, 2, False, 1, "gather"), (2, 2, True, 1, "gather"),
        (4, 2, False, 1, "gather"), (4, 2, True, 1, "gather"),
        (2, 1, False, 2, "gather"), pytest.param(4, 2, True, 2, "gather", marks=SLOW),
        pytest.param(4, 1, False, 2, "heads", marks=SLOW), pytest.param(4, 1, False, 4, "heads", marks=SLOW),
    ],
)  # fmt: skip
def test_the_curve_does_not_depend_on_the_layout(
    world_size: int, tensor_parallel_size: int, sequence_parallel: bool, context: int, exchange: str
):
    want = torch.tensor(reference(), dtype=torch.float64)
    for answers in run_ranks(curves, world_size, tensor_parallel_size, sequence_parallel, context, exchange):
        for layout, curve in answers.items():
            torch.testing.assert_close(
                torch.tensor(curve, dtype=torch.float64),
                want,
                rtol=1e-5,
                atol=0,
                msg=lambda text, layout=layout: f"{layout}: {text}",
            )
