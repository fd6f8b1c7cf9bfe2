"""Gradients of every parameter under recomputation, layout, engine, precision and compilation, against plain torch.

The weights are large (0.1): at 0.02 a gradient that is 19 % wrong moves the norm of all gradients by 1e-4 only.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import trainer.zero
from launch.config import RunConfig, build
from launch.train import make_engine
from model.parallel import Topology, make_topology
from tests.combinations.network import Batch, gradients
from tests.combinations.weights import initial_weights
from tests.ranks import run_ranks
from trainer.engine import Engine
from trainer.fragments import Fragment
from trainer.optimizer import Update

BETA = 0.9
ENGINES = ("zero 1", "zero 2", "zero 3", "fold")
RECOMPUTE = ("none", "selective", "full")
ATTENTION: dict[str, dict[str, Any]] = {
    "gqa": {"num_key_value_heads": 2},
    "mla": {
        "attention": "mla", "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    },
}  # fmt: skip
LAYOUTS = {"tensor 1": (1, False), "tensor 2": (2, False), "tensor 2, sequence": (2, True)}
ROWS, LENGTH, VOCABULARY = 4, 32, 96

Case = tuple[str, str, str, str]
"""Recomputation, attention, engine, precision."""
Pieces = dict[str, list[tuple[tuple[int, ...], tuple[int, ...], int, np.ndarray]]]
"""Name -> (slice_start, slice_shape, offset, flat gradient) of what a rank holds."""


def configuration(case: Case, tensor: int, sequence: bool, compiled: bool) -> RunConfig:
    recompute, attention, engine, precision = case
    zero = {"engine": "fold"} if engine == "fold" else {"zero_stage": int(engine[-1])}
    return build(
        {
            "model": {
                "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                "num_attention_heads": 4, "initializer_range": 0.1, **ATTENTION[attention],
            },
            "train": {
                "precision": precision, "sequence_length": LENGTH, "global_batch_size": ROWS, "micro_batch_size": 2,
                "recompute": recompute, "compile": compiled,
            },
            "optimizer": {"name": "tiger", "betas": [BETA], "max_grad_norm": 0.0, "compile": False},
            "parallel": {**zero, "tensor_parallel_size": tensor, "sequence_parallel": sequence},
        }
    )  # fmt: skip


def batches() -> list[Batch]:
    tokens = torch.randint(0, VOCABULARY, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    return [(part[:, :-1].contiguous(), part[:, 1:].contiguous(), None) for part in tokens.split(2)]


def rank_gradients(rank: int, world_size: int, cases: Sequence[Case], layout: str, compiled: bool) -> list[Pieces]:
    """What this rank's engine has of the gradients of one update, case after case."""
    tensor, sequence = LAYOUTS[layout]
    topology = make_topology(tensor, torch.device("cpu"))
    mine = [SimpleNamespace(inputs_BS=i, targets_BS=t, cu_seqlens=b) for i, t, b in batches()]
    found = []
    for case in cases:
        torch._dynamo.reset()
        engine = make_engine(configuration(case, tensor, sequence, compiled), topology, world_size)
        engine.accumulate(mine)
        found.append(taken(engine, topology))
        engine.close()
    return found


def taken(engine: Engine, topology: Topology) -> Pieces:
    pieces: Pieces = {}

    def take(fragments: list[Fragment], *_: Any, **__: Any) -> Update:
        for f in fragments:
            flat = f.gradient if f.gradient is not None else f.momentum() / (1 - BETA)
            place = (f.slice_start, f.slice_shape, f.offset, flat.float().numpy().copy())
            pieces.setdefault(f.name, []).append(place)
        return Update(torch.zeros(()), torch.zeros((), dtype=torch.bool))

    if isinstance(engine, trainer.zero.Zero):
        trainer.zero.update = take
        engine.update(0.0)
    else:
        take(engine.fragments())
    return pieces


def joined(ranks: list[Pieces], shapes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    """Full gradients; NaN where no rank had any."""
    whole = {name: torch.full(shape, torch.nan) for name, shape in shapes.items()}
    for pieces in ranks:
        for name, places in pieces.items():
            for start, shape, offset, flat in places:
                part = whole[name]
                for dimension, (first, length) in enumerate(zip(start, shape, strict=True)):
                    part = part.narrow(dimension, first, length)
                copy = part.reshape(-1).clone()
                copy[offset : offset + flat.size] = torch.from_numpy(flat)
                part.copy_(copy.view(shape))
    return whole


def check_cases(cases: Sequence[Case], layout: str, compiled: bool) -> None:
    tensor, sequence = LAYOUTS[layout]
    ranks = run_ranks(rank_gradients, tensor, cases, layout, compiled, timeout_seconds=280)
    wrong, truths = [], {}
    for index, case in enumerate(cases):
        config, key = configuration(case, tensor, sequence, compiled), (case[1], case[3])
        if key not in truths:
            weights = initial_weights(config)
            truth = gradients(config, {n: w.double() for n, w in weights.items()}, batches(), torch.float64)[1]
            truths[key] = truth, gradients(config, weights, batches(), torch.bfloat16)[1]
        truth, narrow = truths[key]
        got = joined([rank[index] for rank in ranks], {name: g.shape for name, g in truth.items()})
        for name, want in truth.items():
            allowed = 1e-5 if case[3] == "fp32" else 3 * distance(narrow[name], want) + 2e-3
            if not distance(got[name], want) <= allowed:
                wrong.append(f"{case} {name}: {distance(got[name], want):.2e}, allowed {allowed:.2e}")
    assert not wrong, f"{len(wrong)} gradients: " + "\n".join(wrong[:20])


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_selective_recomputation_has_the_gradients_of_none(layout: str):
    """Under tensor parallelism kept products were once reduced a second time: 19 % off, and no loss showed it."""
    check_cases([("selective", a, e, "fp32") for a in ATTENTION for e in ("zero 1", "zero 3", "fold")], layout, False)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_case_eager(layout: str):
    check_cases([(r, a, e, p) for r in RECOMPUTE for a in ATTENTION for e in ENGINES for p in ("fp32", "bf16")], layout, False)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_case_compiled(layout: str, attention: str, precision: str):
    cases = [(r, attention, e, precision) for r in RECOMPUTE for e in ENGINES if (r, e) != ("selective", "zero 3")]
    check_cases(cases, layout, True)
