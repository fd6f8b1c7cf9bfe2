"""What torch's compiler makes of tiglon for an H200, and the speed that follows: counted, without a GPU.

    python -m benchmarks.kernels [--output docs/results]

Compiles blocks of Llama 3 8B's shape, the loss, the update and what surrounds cuDNN's attention for sm_90 from fake
tensors (benchmarks/without_gpu.py): the kernels that are launched, the bytes that they move, whether Triton compiles them.
From the bytes and the planner's rates follows a roofline of a whole step, beside the planner's own prediction.
"""

import argparse
import importlib.util
import json
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import without_gpu
from benchmarks.contestants import SHAPES
from benchmarks.without_gpu import Graph, graphs, on_it
from launch import network as networks
from launch.config import RunConfig
from launch.load_config import build_config
from launch.planner.memory import layout_of
from launch.planner.time import ACCELERATORS, Assumptions, predict
from model import loss
from model.attention.kernels import three_calls
from model.flops import attention_flops_per_token, matrix_flops_per_token
from model.parallel.mesh import Mesh
from model.positions.batch import TokenLayout
from model.sizes import parameter_counts
from trainer.optimizers import fused, rounding
from trainer.optimizers.tiger import Tiger

LENGTH, BATCH = 4096, 2
TOKENS = LENGTH * BATCH
LATENT = {
    "num_key_value_heads": 32, "attention": "mla", "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128,
}  # fmt: skip
BLOCKS: dict[str, tuple[dict[str, Any], tuple[str, ...], str]] = {
    "rope": ({}, (), "none"),
    "rerope": ({}, ("position.kind=rerope", f"position.window={LENGTH // 4}"), "none"),
    "rope, selective recomputation": ({}, (), "selective"),
    "mla": (LATENT, (), "none"),
}
"""Name -> (sizes other than Llama's, overrides, recomputation)."""
GENERATED = re.compile(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str='cuda'\)", re.DOTALL)
"""A kernel's name and source in what Inductor writes."""
GAP_SECONDS = 1.5e-6
"""Between two kernels of a stream that is never empty: an assumption."""


@dataclass
class Counted:
    """One compiled function."""

    name: str
    graphs: list[Graph]
    per: int
    """Tokens, or parameters, that its bytes are divided by."""

    def row(self) -> dict[str, Any]:
        """For the page."""
        kinds = ("forward", "backward") if len(self.graphs) == 2 else ("",)
        return {"name": self.name} | {
            f"{kind} {what}".strip(): value
            for kind, graph in zip(kinds, self.graphs, strict=True)
            for what, value in (
                ("generated", graph.triton), ("others", len(graph.extern)), ("bytes", round(graph.triton_bytes / self.per, 2)),
                ("bytes of others", round(graph.extern_bytes / self.per, 2)),
            )
        }  # fmt: skip


def configuration(name: str) -> RunConfig:
    """Llama 3 8B under fold, as it would train on one GPU."""
    sizes, overrides, _ = BLOCKS[name]
    model = {key: value for key, value in SHAPES["8b"].model().items() if key not in sizes} | sizes
    return build_config({
        "model": model,
        "optimizer": {"name": "tiger"},
        "train": {
            "sequence_length": LENGTH, "micro_batch_size": BATCH, "global_batch_size": BATCH, "precision": "bf16",
            "compile": True,
        },
        "parallel": {"engine": "fold"},
    }, overrides)  # fmt: skip


def block(name: str, mode: FakeTensorMode) -> Counted:
    """Forward and backward of one block, by the way that `train.compile` compiles it."""
    config = configuration(name)
    one = config.model_copy(update={"model": config.model.model_copy(update={"num_hidden_layers": 1})})
    with on_it(mode):
        model = networks.build_network(one, Mesh(device=torch.device("cuda")), BLOCKS[name][2])
        how = model.positions_for(TokenLayout(BATCH, LENGTH))
        x_TD = torch.empty(TOKENS, config.model.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    found = graphs(lambda x: model.run_block(model.model.layers[0], x, how, None), x_TD, mode=mode, compiled=True)
    return Counted(f"block, {name}", found, TOKENS)


def others(mode: FakeTensorMode) -> list[Counted]:
    """The loss of a chunk, what joins cuDNN's squares, and the update's kernels on the largest matrix of a block."""
    model = configuration("rope").model
    rows, columns, heads = model.intermediate_size, model.hidden_size, (model.num_attention_heads, model.head_size)
    chunk = 1024  # tokens; the compiler's own counter stops at 10^9 elements of a tensor, which a real chunk may have
    window = LENGTH // 4
    with on_it(mode):
        words, wide = {"dtype": torch.int32}, {"dtype": torch.float32}
        draw = (torch.empty(rows, 1, **words), torch.empty(rows, 1, **words), torch.empty(columns, **words))
        w, g = (torch.empty(rows, columns, dtype=torch.bfloat16) for _ in range(2))
        flat = [torch.empty(rows * columns, **wide) for _ in range(3)]
        mean = torch.empty(rows, columns, **wide)
        row, one, two, eight = (torch.empty(*size, **wide) for size in ((rows, 1), (1, 1), (2,), (8,)))
        zero = torch.empty((), **wide)
        logits = torch.empty(chunk, model.vocab_size, dtype=torch.bfloat16)
        targets = torch.empty(chunk, dtype=torch.int64)
        count = LENGTH // window
        sizes = ((BATCH * count, window), (BATCH * (count - 1), window - 1), (BATCH, LENGTH - window))
        parts = [(torch.empty(*size, *heads, dtype=torch.bfloat16), torch.empty(*size, heads[0], **wide)) for size in sizes]
        numbers = tuple(torch.empty(size, **words) for size in (4096, 4096, 8192, 8192))
        keys = torch.empty(64, 2, dtype=torch.int64)
    made: list[tuple[str, Callable[..., Any], tuple[Any, ...], int]] = [
        ("softmax and its gradient, per token", loss._whole_softmax, (logits, targets, model.vocab_size), chunk),
        ("join of cuDNN's squares, per token", lambda *p: three_calls._join(LENGTH, window, *p), tuple(parts), TOKENS),
        ("fold, per parameter", fused.compiled_for(fused.fold_kernel, Tiger), ([w], g, row, two, [draw]), rows * columns),
        ("fold's mean over ranks, per parameter", fused.compiled(fused.store_mean), (w, mean, draw), rows * columns),
        (
            "fold's move, per parameter",
            fused.compiled_for(fused.move_kernel, Tiger),
            (w, [g], one, zero, two, draw),
            rows * columns,
        ),
        (
            "Tiger on masters, per parameter",
            fused.compiled_for(fused.update_kernel, Tiger),
            (flat[0], flat[2], [flat[1]], eight),
            rows * columns,
        ),
        ("random words, per word", rounding._hash_words, (*numbers, keys), 4096 + 2 * 8192),
    ]
    with torch.no_grad():
        return [
            Counted(name, graphs(function, *inputs, mode=mode, compiled="per parameter" in name), per)
            for name, function, inputs, per in made
        ]


def as_cudnn(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, scale: float, enable_gqa: bool) -> Tensor:
    """What scaled_dot_product_attention calls on Hopper."""
    operator = torch.ops.aten._scaled_dot_product_cudnn_attention
    return operator(q, k, v, None, True, 0.0, is_causal, False, scale=scale)[0]


def measure() -> list[Counted]:
    """Everything, in a process that pretends a GPU."""
    F.scaled_dot_product_attention = as_cudnn  # whose choice would ask the device
    networks.initialise = lambda *arguments: None  # no numbers are drawn
    mode = FakeTensorMode()
    return [*(block(name, mode) for name in BLOCKS), *others(mode)]


def compile_for_sm90(counted: list[Counted]) -> tuple[int, int]:
    """Have Triton compile every generated kernel; how many, and how many of them failed."""
    sources: dict[str, str] = {}
    for one in counted:
        for graph in one.graphs:
            for name, text in re.findall(
                r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str='cuda'\)", graph.source, re.DOTALL
            ):
                sources[text] = name
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for number, (text, name) in enumerate(sources.items()):
            path = Path(folder) / f"kernel_{number}.py"
            path.write_text(text)
            spec = importlib.util.spec_from_file_location(path.stem, path)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            try:
                getattr(module, name).precompile(warm_cache_only=True)
            except Exception as error:
                failed += 1
                print(f"{name}: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr)
    return len(sources), failed


def roofline(counted: list[Counted]) -> tuple[dict[str, float], dict[str, float]]:
    """Milliseconds of the parts of a step of 8,192 tokens on one H200: from the counted bytes, and by the planner."""
    config, gpu, assumed = configuration("rope"), ACCELERATORS["h200"], Assumptions()
    planned = predict(config, layout_of(config, 1), gpu)
    model, by_name = config.model, {one.name: one for one in counted}
    bandwidth = gpu.memory_bandwidth * assumed.memory_efficiency
    own = by_name["block, rope"].graphs
    softmax = by_name["softmax and its gradient, per token"]
    count = parameter_counts(model)["total"]
    moved = {name: by_name[name].graphs[0].triton_bytes / by_name[name].per for name in by_name if "per parameter" in name}
    launches = sum(graph.triton + len(graph.extern) for graph in own) * model.num_hidden_layers
    rate = gpu.matrix_flops * gpu.sustained * model.intermediate_size / (model.intermediate_size + assumed.narrow_columns)
    found = {
        "matrix products": 3 * matrix_flops_per_token(model) * TOKENS / rate,
        "attention": 3 * attention_flops_per_token(model, LENGTH, causal=True) * TOKENS
        / (gpu.matrix_flops * assumed.attention_efficiency),
        "pointwise": sum(graph.triton_bytes for graph in own) * model.num_hidden_layers / bandwidth,
        "loss": softmax.graphs[0].triton_bytes / softmax.per * TOKENS / bandwidth,
        "the head's gradients scaled, eager": 20 * (model.vocab_size + TOKENS) * model.hidden_size / bandwidth,
        "update": count * (moved["fold, per parameter"] + moved["fold's move, per parameter"] + 2) / bandwidth,
        "gaps": launches * GAP_SECONDS,
    }  # fmt: skip
    beside = {
        "matrix products": planned.matrices, "attention": planned.attention, "pointwise": planned.pointwise,
        "update": planned.optimizer,
    }  # fmt: skip
    return {name: 1e3 * value for name, value in found.items()}, {name: 1e3 * value for name, value in beside.items()}


def lines(counted: list[Counted], kernels: tuple[int, int], found: dict[str, float], planned: dict[str, float]) -> list[str]:
    """The page."""
    rows = [one.row() for one in counted]
    release = torch.__version__.partition("+")[0]
    text = [
        "# What the compiler makes of it for an H200, without one", "",
        "    python -m benchmarks.kernels --output docs/results", "",
        f"torch {release}. Generated by Inductor for sm_90 from fake tensors: launches, and bytes "
        "that generated kernels read and write; a tensor that a kernel reads twice counts once, and the partial sums of gains' "
        "gradients, 4 KB per token in the backward, are left out. Others are products and attention. "
        f"Every block is one graph. Triton compiled {kernels[0] - kernels[1]} of the {kernels[0]} different kernels. "
        "tiglon has no Triton kernel of its own, so there is none to run in Triton's interpreter.", "",
        f"One block of Llama 3 8B, {BATCH} sequences of {LENGTH:,} tokens, bfloat16, per token:", "",
        "| | generated, forward | others | bytes | generated, backward | others | bytes | both |", "|---" * 8 + "|",
    ]  # fmt: skip
    for row in rows:
        if "forward bytes" in row:
            both = row["forward bytes"] + row["backward bytes"]
            text.append(
                f"| {row['name']} | {row['forward generated']} | {row['forward others']} | {row['forward bytes']:,.0f} | "
                f"{row['backward generated']} | {row['backward others']} | {row['backward bytes']:,.0f} | {both:,.0f} |"
            )
    text += ["", "| | generated | bytes |", "|---|---|---|"]
    text += [f"| {row['name']} | {row['generated']} | {row['bytes']:,} |" for row in rows if "bytes" in row]
    total, beside = sum(found.values()), sum(planned.values())
    text += [
        "",
        "The roofline that follows, of a step of 8,192 tokens under fold on one H200, beside the planner's "
        "(`launch/planner/time.py`, whose rates both use: products at 80 % of the data sheet, less what tiles lose, "
        "attention at 45 %, memory at 80 %; a gap of 1.5 microseconds between kernels is assumed here). It reads weights once "
        "more than the two kernels above, for their RMS; the head's gradients are scaled operation by operation, 20 bytes per "
        "element. Nobody has measured it. Products at 680 to 740 TFLOP/s would take 498 to 542 ms; the embedding and the last "
        "norm, eager and about 1.5 ms, are left out. The planner counts "
        "more pointwise traffic than tiglon's compiled blocks have, the loss included: its constants were set on published "
        "runs of others, which fuse less, and with the counted bytes in their place its mean error on those rises from 6 to "
        "11 %.", "",
        "| | ms, from the counts | ms, planned | planned over counted |", "|---|---|---|---|",
    ]  # fmt: skip
    for name, value in found.items():
        other = "in pointwise |" if name == "loss" else "|"
        if name in planned:
            other = f"{planned[name]:.1f} | {planned[name] / value:.2f}"
        text.append(f"| {name} | {value:.1f} | {other} |")
    text.append(f"| all | {total:.1f} | {beside:.1f} | {beside / total:.2f} |")
    text.append(f"| tokens/s | {1e3 * TOKENS / total:,.0f} | {1e3 * TOKENS / beside:,.0f} | |")
    return text


def main() -> int:
    """Count and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder of kernels.md and kernels.json")
    given = parser.parse_args()
    why = without_gpu.missing()
    if not why and given.output and not given.output.is_dir():
        why = f"--output {given.output} is no folder; make it first"
    if why:
        print(f"benchmarks.kernels: {why}", file=sys.stderr)
        return 2
    without_gpu.pretend()
    counted = measure()
    kernels, (found, planned) = compile_for_sm90(counted), roofline(counted)
    page = lines(counted, kernels, found, planned)
    print("\n".join(page))
    if given.output:
        (given.output / "kernels.md").write_text("\n".join(page) + "\n")
        record = {
            "torch": torch.__version__,
            "counted": [one.row() for one in counted],
            "counted_ms": found,
            "planned_ms": planned,
        }
        (given.output / "kernels.json").write_text(json.dumps(record, indent=1) + "\n")
    return int(kernels[1] > 0)


if __name__ == "__main__":
    sys.exit(main())
