"""The step-time model against published runs, and what it predicts up to 16,384 GPUs.

    python -m benchmarks.scaling [--output docs/results]

Writes plan_scaling.json (every published point, the prediction, the error) and plan_scaling.png.
"""

import argparse
import json
from dataclasses import asdict, dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from launch.config import RunConfig
from launch.load_config import build_config
from launch.planner.communication import WEIGHT_GATHER, Message, pipeline_messages, tensor_parallel_messages
from launch.planner.memory import Layout, portions_of
from launch.planner.pipeline import owned_elements
from launch.planner.time import ACCELERATORS, Assumptions, predict
from model.flops import flops_per_token


def llama(hidden_size: int, intermediate_size: int, layers: int, heads: int, keys: int, vocab_size: int) -> dict[str, Any]:
    """[model] of an untied Llama."""
    return {
        "vocab_size": vocab_size, "hidden_size": hidden_size, "intermediate_size": intermediate_size,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": keys, "tie_word_embeddings": False,
    }  # fmt: skip


def gpt(hidden_size: int, layers: int, heads: int) -> dict[str, Any]:
    """[model] of a GPT with mlps of 4 times its width: the SwiGLU width of as many weights stands in for it, rounded to a
    multiple of 8."""
    return llama(hidden_size, 8 * round(hidden_size / 3), layers, heads, heads, 51200)


MODELS = {
    "Llama-3 8B": llama(4096, 14336, 32, 32, 8, 128256),
    "Llama-3 70B": llama(8192, 28672, 80, 64, 8, 128256),
    "Llama 7B": llama(4096, 11008, 32, 32, 32, 32000),
    "InternLM 7B": llama(4096, 11008, 32, 32, 32, 103168),
    # published as GPT blocks of 8 width^2 mlp weights; the SwiGLU width of as many weights stands in for them
    "MPT 7B": llama(4096, 10923, 32, 32, 32, 50368),
    "MPT 3B": llama(2560, 6827, 32, 20, 20, 50368),
    "MPT 1B": llama(2048, 5461, 24, 16, 16, 50368),
    "GPT-3 1.3B": llama(2048, 5461, 24, 16, 16, 50304),
    "Llama-3 405B": llama(16384, 53248, 126, 128, 8, 128256),
    "GPT 39.1B": gpt(8192, 48, 64),
    "GPT 76.1B": gpt(10240, 60, 80),
    "GPT 145.6B": gpt(12288, 80, 96),
    "GPT 310.1B": gpt(16384, 96, 128),
    "GPT 529.6B": gpt(20480, 105, 128),
    "GPT 1008B": gpt(25600, 128, 160),
}


@dataclass(frozen=True)
class Published:
    """One measured run of another trainer, and what is known of its conditions."""

    source: str
    model: str
    sequence_length: int
    device: str
    gpus: int
    tensor: int
    stage: int
    """The ZeRO stage that does what it did: FSDP is 3."""
    micro_batch: int
    micro_batches: int
    recompute: str
    tokens_per_second: float
    """Of one GPU."""
    fitted: bool = False
    """A constant of the model was set on it, so that its error proves nothing."""
    eager: bool = False
    conditions: str = ""
    shard_ranks: int | None = None
    pipeline: int = 1
    stages_per_rank: int = 1


def internevo(gpus: int, tokens_per_second: float, shard_ranks: int | None, fitted: bool = False) -> Published:
    """InternEvo's 7B on A100 with 4 x 100 Gb/s a node; it reduces once, in bf16, as a single micro-batch would."""
    return Published(
        "InternEvo, ZeRO-1 " + ("global" if shard_ranks is None else "inside a node"), "InternLM 7B", 2048, "a100", gpus, 1, 1,
        8, 1, "none", tokens_per_second, fitted, True, "internevo", shard_ranks,
    )  # fmt: skip


def megatron(model: str, gpus: int, pipeline: int, stages_per_rank: int, batch: int, teraflops: float) -> Published:
    """A row of Narayanan et al. 2021 (Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM, arXiv
    2104.04473), table 1: tensor 8, interleaved, full recomputation, nothing of data parallelism partitioned.

    Micro-batches (one sequence) and the stages of a rank (the fewest above 1 that divide its layers) are assumed; they are not
    published.

    Args:
        teraflops: of one GPU per second by the paper's formula, which counts the recomputation.
    """
    sizes = MODELS[model]
    layers, width = sizes["num_hidden_layers"], sizes["hidden_size"]
    per_token = 96 * layers * width**2 * (1 + 2048 / (6 * width) + sizes["vocab_size"] / (16 * layers * width))
    return Published(
        f"Megatron-LM, pipeline {pipeline}", model, 2048, "a100", gpus, 8, 1, 1, batch * 8 * pipeline // gpus, "full",
        teraflops * 1e12 / per_token, eager=True, shard_ranks=1, pipeline=pipeline, stages_per_rank=stages_per_rank,
    )  # fmt: skip


def llama_3(gpus: int, micro_batches: int, teraflops: float) -> Published:
    """A row of Grattafiori et al. 2024 (The Llama 3 Herd of Models, arXiv 2407.21783), table 4, of 8,192 tokens: tensor 8,
    pipeline 16, without recomputation, gradients summed in float32 once per update.

    The stages of a rank are assumed, as many as 126 layers allow; they are not published. FLOPs are taken as counted causally.

    Args:
        teraflops: of one GPU per second.
    """
    per_token = flops_per_token(configuration("Llama-3 405B", 8192, 1, 1).model, 8192, causal=True)
    return Published(
        "Llama 3, pipeline 16", "Llama-3 405B", 8192, "h100", gpus, 8, 1, 1, micro_batches, "none",
        teraflops * 1e12 / per_token, pipeline=16, stages_per_rank=7,
    )  # fmt: skip


def configuration(model: str, length: int, batch: int, micro: int, bucket: int = 50_000_000) -> RunConfig:
    """A configuration for the predictor."""
    return build_config({
        "model": dict(MODELS[model]), "optimizer": {"name": "adamw"}, "parallel": {"reduce_bucket_elements": bucket},
        "train": {"sequence_length": length, "global_batch_size": batch, "micro_batch_size": micro},
    })  # fmt: skip


POINTS = [
    Published("KempnerForge", "Llama-3 8B", 4096, "h200", 1, 1, 3, 4, 2, "full", 10471, fitted=True),
    Published("KempnerForge, FSDP", "Llama-3 8B", 4096, "h200", 2, 1, 3, 4, 2, "full", 9364),
    Published("KempnerForge, FSDP", "Llama-3 8B", 4096, "h200", 4, 1, 3, 4, 2, "full", 9746),
    Published("KempnerForge, tensor 2", "Llama-3 8B", 4096, "h200", 2, 2, 3, 4, 2, "full", 6582),
    Published("ColossalAI, ZeRO-2", "Llama 7B", 4096, "h200", 8, 1, 2, 36, 1, "full", 8771, eager=True),
    Published("torchtitan, FSDP", "Llama-3 8B", 8192, "h100", 8, 1, 3, 2, 1, "selective", 6667, True, conditions="500 W"),
    Published("torchtitan eager", "Llama-3 8B", 8192, "h100", 8, 1, 3, 2, 1, "selective", 5762, eager=True, conditions="500 W"),
    Published("torchtitan, FSDP", "Llama-3 8B", 8192, "h100", 128, 1, 3, 2, 1, "selective", 6514, conditions="500 W"),
    Published("torchtitan, tensor 8", "Llama-3 8B", 8192, "h100", 64, 8, 3, 12, 1, "selective", 4378, True, conditions="500 W"),
    Published("torchtitan, tensor 8", "Llama-3 70B", 8192, "h100", 256, 8, 3, 16, 1, "full", 597, conditions="500 W"),
    Published("llm-foundry, FSDP", "MPT 7B", 2048, "h100", 8, 1, 3, 6, 1, "none", 10643, True, True),
    Published("llm-foundry, FSDP", "MPT 3B", 2048, "h100", 16, 1, 3, 8, 1, "none", 24142, eager=True),
    Published("llm-foundry, FSDP", "MPT 1B", 2048, "h100", 8, 1, 3, 14, 1, "none", 45455, eager=True),
    Published("fms-fsdp", "Llama 7B", 4096, "h100", 128, 1, 3, 2, 1, "selective", 9600),
    Published("FlashAttention's trainer", "GPT-3 1.3B", 2048, "a100", 8, 1, 1, 8, 4, "none", 21100),
    *(
        internevo(gpus, speed, None, fitted=gpus == 1024)
        for gpus, speed in zip(
            (8, 16, 32, 64, 128, 256, 512, 1024), (4062, 3842, 3752, 3690, 3571, 3209, 2861, 2271), strict=True
        )
    ),
    *(
        internevo(gpus, speed, 8, fitted=gpus == 8)
        for gpus, speed in zip(
            (8, 16, 32, 64, 128, 256, 512, 1024), (4078, 3939, 3919, 3944, 3928, 3920, 3835, 3625), strict=True
        )
    ),
    megatron("GPT 39.1B", 512, 2, 2, 1536, 138),
    megatron("GPT 76.1B", 1024, 4, 3, 1792, 140),
    megatron("GPT 145.6B", 1536, 8, 2, 2304, 148),
    megatron("GPT 310.1B", 1920, 16, 2, 2160, 155),
    megatron("GPT 529.6B", 2520, 35, 3, 2520, 163),
    megatron("GPT 1008B", 3072, 64, 2, 3072, 163),
    llama_3(8192, 32, 430),
    llama_3(16384, 16, 400),
]  # fmt: skip


def predicted(point: Published) -> float:
    """Tokens per second of one GPU, by the model."""
    data = point.gpus // (point.tensor * point.pipeline)
    # other trainers send a block (FSDP) or 512 MB (InternEvo) at once
    bucket = 1 << 28 if point.conditions == "internevo" else 220_000_000
    config = configuration(
        point.model, point.sequence_length, data * point.micro_batch * point.micro_batches, point.micro_batch, bucket
    )
    layout = Layout(
        data, point.tensor, point.tensor > 1, "zero", point.stage, "none",
        point.micro_batch, point.micro_batches, point.recompute, pipeline_parallel_size=point.pipeline,
        pipeline_stages_per_rank=point.stages_per_rank,
    )  # fmt: skip
    device, assumed = ACCELERATORS[point.device], Assumptions()
    if point.eager:
        assumed = replace(assumed, pointwise_passes=2.5)
    if point.conditions == "500 W":  # a lower power limit and slower memory; every other matrix product is repeated
        device = replace(device, sustained=0.5, memory_bandwidth=2.4e12)
        assumed = replace(assumed, selective_passes=3.5)
    if point.conditions == "internevo":
        device = replace(device, network_bandwidth=6.25e9)
        if point.shard_ranks is None:  # updated weights return by one broadcast a rank
            assumed = replace(assumed, broadcast_seconds=2.5e-3)
    parts = others(config, layout, point.shard_ranks)
    return predict(config, layout, device, assumed, point.shard_ranks, parts).tokens_per_second_per_gpu


def others(config: RunConfig, layout: Layout, shard_ranks: int | None) -> list[Message]:
    """What FSDP and InternEvo send, where DeepSpeed does otherwise: gradients are scattered, weights gathered for each pass,
    and what tensor-parallel sums gave is kept under selective recomputation.

    Args:
        shard_ranks: ranks that share one copy of the optimizer states; the gradients' parts are then summed over the copies.
    """
    data, portions = layout.data_parallel_size, portions_of(config, layout)
    longest = max(range(len(portions)), key=lambda rank: len(portions[rank].layers))
    ranks, times, numbers = (
        shard_ranks or data,
        layout.micro_batches,
        sum(owned_elements(config.model, layout.tensor_parallel_size, portions[longest]).values()),
    )
    volume, bucket = 2 * numbers, 2 * config.parallel.reduce_bucket_elements
    messages, twice = max(1, ceil(volume / bucket)), times * 2
    back = Message(WEIGHT_GATHER, "all-gather", "data", ranks, volume, messages)
    grads = Message("scatter of gradients", "reduce-scatter", "data", ranks, volume * times, messages * times, True)
    match layout.zero_stage:
        case 1 if len(portions) > 1:  # once, in float32
            parts = [Message("scatter of gradients", "reduce-scatter", "data", ranks, 2 * volume, messages), back]
        case 1 if times > 1:  # once, in float32
            parts = [
                Message("sum of gradients", "all-reduce", "data", ranks, 2 * volume, max(1, ceil(2 * volume / bucket))),
                back,
            ]
        case 1 | 2:
            parts = [grads, back]
        case _:
            parts = [Message("gather of weights", "all-gather", "data", ranks, volume * twice, messages * twice, True), grads]
    if ranks < data:
        part = volume // ranks
        parts.append(Message("sum over copies", "all-reduce", "copies", data // ranks, part, max(1, ceil(part / bucket)), True))
    kept = replace(layout, recompute="full" if layout.recompute == "full" else "none")
    inside = tensor_parallel_messages(config, kept, "cuda", longest) if layout.tensor_parallel_size > 1 else []
    between = [*pipeline_messages(config, layout)] if len(portions) > 1 else []
    return [part for part in [*inside, *between, *parts] if part.ranks > 1]


GPUS = [2**power for power in range(3, 15)]
WAYS = {
    "ZeRO-1, over all ranks": ("zero", 1, None),
    "ZeRO-1, inside a node (not in DeepSpeed)": ("zero", 1, 8),
    "ZeRO-3, over all ranks": ("zero", 3, None),
    "fold": ("fold", 1, None),
}


def curve(model: str, length: int, micro: int, count: int, device: str, how: tuple[Any, int, int | None]) -> list[float]:
    """Tokens per second of one GPU from 8 to 16,384 GPUs, at the same number of tokens per GPU."""
    engine, stage, shard = how
    values = []
    for gpus in GPUS:
        config = configuration(model, length, gpus * micro * count, micro)
        layout = Layout(gpus, 1, False, engine, stage, "none", micro, count, "none")
        parts = None if shard is None else others(config, layout, shard)
        step = predict(config, layout, ACCELERATORS[device], Assumptions(), shard, parts)
        values.append(step.tokens_per_second_per_gpu)
    return values


def draw(rows: list[dict[str, Any]], curves: dict[str, list[float]], path: Path) -> None:
    """Published points with their predictions, and the predicted curves up to 16,384 GPUs, over the number of GPUs."""
    figure, axes = plt.subplots(figsize=(12, 6))
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(f"{row['source']}: {row['model']}, {row['device']}", []).append(row)
    colours = [*plt.get_cmap("tab20").colors, *plt.get_cmap("tab20b").colors]  # type: ignore[attr-defined]
    for colour, (name, members) in zip(colours, groups.items(), strict=False):
        gpus = [row["gpus"] for row in members]
        axes.plot(gpus, [row["tokens_per_second"] for row in members], "o", color=colour, label=name, markersize=5)
        axes.plot(gpus, [row["predicted"] for row in members], "x", color=colour, markersize=7)
    for style, (name, values) in zip(("-", "--", "-.", ":"), curves.items(), strict=True):
        axes.plot(GPUS, values, style, color="black", linewidth=1, label=f"tiglon, predicted: {name}")
    axes.set(
        xscale="log", yscale="log", xlabel="GPUs", ylabel="tokens/s a GPU",
        title="Published (dots), predicted (crosses); lines: Llama-3 8B on H200, 32k tokens per GPU and update",
    )  # fmt: skip
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Print the table, write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", default="docs/results", help="folder of the figures")
    output = Path(parser.parse_args().output)
    rows = [asdict(point) | {"predicted": predicted(point)} for point in POINTS]
    for row in rows:
        row["error"] = row["predicted"] / row["tokens_per_second"] - 1
        print(
            f"| {row['source']} | {row['model']} | {row['gpus']} x {row['device']} | {row['tokens_per_second']:,.0f} | "
            f"{row['predicted']:,.0f} | {row['error']:+.0%}{' (fitted)' if row['fitted'] else ''} |"
        )
    free = [abs(row["error"]) for row in rows if not row["fitted"]]
    print(f"\n{len(free)} points not fitted: mean error {sum(free) / len(free):.0%}, largest {max(free):.0%}")
    curves = {name: curve("Llama-3 8B", 4096, 2, 4, "h200", how) for name, how in WAYS.items()}
    for name, values in curves.items():
        print(f"{name}: {values[0]:,.0f} tokens/s a GPU at 8, {values[7]:,.0f} at 1,024, {values[-1]:,.0f} at 16,384")
    output.mkdir(parents=True, exist_ok=True)
    (output / "plan_scaling.json").write_text(json.dumps({"points": rows, "gpus": GPUS, "curves": curves}, indent=1) + "\n")
    draw(rows, curves, output / "plan_scaling.png")


if __name__ == "__main__":
    main()
