"""Sequences that ranks share: balance of the two cuts, bytes kept, and the time of a step. Writes a page.

    python -m benchmarks.shared_sequences [--output docs/results/shared_sequences.md]

On a CPU with gloo, one thread per rank.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launch.config import RunConfig
from launch.load_config import build_config
from launch.network import build_network
from launch.planner.memory import execution_of, layout_of
from model.activations import activations
from model.attention.kernels.inputs import AttentionInputs
from model.attention.kernels.operator import attend
from model.decoder import Decoder
from model.parallel.context import ContextParallel
from model.parallel.mesh import Mesh, make_mesh
from tests.model.test_activations import held_bytes
from tests.ranks import run_ranks

CPU = torch.device("cpu")
MODELS: dict[str, dict[str, Any]] = {
    "GQA 8:2": {"num_attention_heads": 8, "num_key_value_heads": 2},
    "MLA": {
        "num_attention_heads": 8, "attention": "mla", "kv_lora_rank": 128, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16,
        "v_head_dim": 32,
    },
}  # fmt: skip
POSITIONS = {"rope": {}, "inverse leaky-rerope": {"kind": "leaky-rerope", "window": 1024, "leak": 0.125}}
KEPT_LENGTH, STEP_LENGTH, BALANCE_LENGTH = 16384, 8192, 8192


def configuration(model: str, position: str, length: int, ranks: int, exchange: str, recompute: str = "none") -> RunConfig:
    """A network of two layers, one sequence per update."""
    sizes = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, **MODELS[model]}
    return build_config(
        {
            "model": sizes, "position": POSITIONS[position],
            "train": {
                "precision": "fp32", "sequence_length": length, "global_batch_size": 1, "micro_batch_size": 1,
                "recompute": recompute,
            },
            "parallel": {"context_parallel_size": ranks, "context_exchange": exchange},
        }
    )  # fmt: skip


def network(config: RunConfig) -> tuple[Decoder, Mesh]:
    """On this rank."""
    size = config.parallel.context_parallel_size
    mesh = make_mesh(1, CPU, context_parallel_size=size) if size > 1 else Mesh()
    return build_network(config, mesh, config.train.recompute), mesh


def sequence(length: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets [1, S]."""
    drawn = torch.randint(0, 512, (1, length + 1), generator=torch.Generator().manual_seed(0))
    return drawn[:, :-1], drawn[:, 1:]


def kept_bytes(rank: int, world_size: int, config: RunConfig) -> int:
    """Of the tensors that a forward leaves for the backward, weights, tokens and the loss left out."""
    model, _ = network(config)
    tokens = sequence(config.train.sequence_length)
    model.lm_head.forward = lambda hidden, *_: hidden  # type: ignore[method-assign]
    model(*tokens)  # caches of positions are made once
    return held_bytes(partial(model, *tokens), model)


def step_seconds(rank: int, world_size: int, config: RunConfig) -> float:
    """The fastest of three forwards and backwards."""
    (model, mesh), (inputs, targets) = network(config), sequence(config.train.sequence_length)
    best = float("inf")
    for _ in range(3):
        mesh.world.sum(torch.zeros(1))  # ranks begin together
        begin = time.perf_counter()
        loss, _ = model(inputs, targets)
        loss.backward()
        best = min(best, time.perf_counter() - begin)
    return best


def attention_seconds(queries: tuple[int, int]) -> float:
    """Of one chunk, forward and backward."""
    start, end = queries
    generator = torch.Generator().manual_seed(start)
    q, k, v = (torch.randn(1, length, 4, 64, generator=generator) for length in (end - start, end, end))
    inputs, best = AttentionInputs(*(x.requires_grad_() for x in (q, k, v))), float("inf")
    for _ in range(2):
        begin = time.perf_counter()
        attend(inputs, 0.125).sum().backward()
        best = min(best, time.perf_counter() - begin)
    return best


def chunks_of(ranks: int, rank: int, length: int, zigzag: bool) -> list[tuple[int, int]]:
    """The queries of a rank."""
    if zigzag:
        return list(ContextParallel(ranks, rank).chunks(length))
    size = length // ranks
    return [(rank * size, (rank + 1) * size)]


def balance(ranks: int) -> list[str]:
    """Rows of a table: pairs and seconds of every rank, with both cuts."""
    rows = []
    for name, zigzag in (("two chunks each, r and 2n - 1 - r", True), ("consecutive parts", False)):
        parts = [chunks_of(ranks, rank, BALANCE_LENGTH, zigzag) for rank in range(ranks)]
        pairs = [sum(end * (end + 1) - start * (start + 1) for start, end in part) / 2 for part in parts]
        seconds = [sum(map(attention_seconds, part)) for part in parts]
        spread = (max(values) / (sum(values) / ranks) for values in (pairs, seconds))
        rows.append(f"| {ranks} | {name} | " + " | ".join(f"{value:.2f}" for value in spread) + " |")
    return rows


def kept_rows() -> list[str]:
    """Rows of a table: measured and planned bytes of the rank that keeps most."""
    rows = []
    for model in MODELS:
        for position in POSITIONS:
            for recompute in ("none", "selective") if position == "rope" else ("none",):
                for ranks, exchange in ((1, "gather"), (2, "gather"), (4, "gather"), (2, "heads"), (4, "heads")):
                    config = configuration(model, position, KEPT_LENGTH, ranks, exchange, recompute)
                    found = max(run_ranks(kept_bytes, ranks, config, timeout_seconds=600))
                    planned = planned_bytes(config)
                    how = exchange if ranks > 1 else ""
                    rows.append(
                        f"| {model} | {position} | {recompute} | {ranks} | {how} | {found / 1e6:.1f} | {planned / 1e6:.1f} | "
                        f"{planned / found - 1:+.1%} |"
                    )
                    print(rows[-1], flush=True)
    return rows


def planned_bytes(config: RunConfig) -> int:
    """What the planner says is kept."""
    layout = layout_of(config, config.parallel.context_parallel_size)
    return activations(config.model, layout.tokens(KEPT_LENGTH), KEPT_LENGTH, execution_of(config, layout, "cpu")).kept


def step_rows() -> list[str]:
    """Rows of a table: seconds of a step on one and on two ranks."""
    rows = []
    for model in MODELS:
        one = run_ranks(step_seconds, 1, configuration(model, "rope", STEP_LENGTH, 1, "gather"), timeout_seconds=600)[0]
        for exchange in ("gather", "heads"):
            config = configuration(model, "rope", STEP_LENGTH, 2, exchange)
            two = max(run_ranks(step_seconds, 2, config, timeout_seconds=600))
            rows.append(f"| {model} | {exchange} | {one:.2f} | {two:.2f} | {one / two:.2f} |")
            print(rows[-1], flush=True)
    return rows


def table(heading: str, rows: Callable[[], list[str]]) -> list[str]:
    """A table of Markdown."""
    return [heading, "|---" * (heading.count("|") - 1) + "|", *rows(), ""]


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/results/shared_sequences.md"))
    output = parser.parse_args().output
    torch.set_num_threads(1)
    lines = [
        "# Shared sequences", "", "    python -m benchmarks.shared_sequences", "",
        f"Two layers of 256, float32, torch {torch.__version__}, a CPU, gloo, one thread per rank. How sequences are shared:",
        "[context.md](../context.md).", "", "## Balance", "",
        f"Attention of {BALANCE_LENGTH:,} tokens under a causal mask, 4 heads of 64: the rank with most over the mean.", "",
        *table("| ranks | cut | pairs of tokens | seconds |", lambda: [row for ranks in (2, 4) for row in balance(ranks)]),
        "## Bytes kept for the backward", "",
        f"MB on the rank that keeps most, one sequence of {KEPT_LENGTH:,} tokens, without the loss.", "",
        *table("| attention | positions | recompute | ranks | exchange | measured | planned | error |", kept_rows),
        "## Time", "",
        f"Forward and backward of one sequence of {STEP_LENGTH:,} tokens on two cores, in seconds. On a CPU chunks of",
        "queries have a kernel of tiles, slower in float32 than torch's fused one, which whole sequences have.", "",
        *table("| attention | exchange | one rank | two ranks | ratio |", step_rows),
    ]  # fmt: skip
    output.write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
