"""Cost of every position map against plain RoPE: rotation and attention, forward and backward, same shapes, one run.

    python -m benchmarks.attention --output docs/results             two-core laptop, fp32 and bf16
    python -m benchmarks.attention --output docs/results --compiled  the kernel of compiled blocks on a CPU, bf16
    python -m benchmarks.attention --output docs/results --device cuda

Kinds take turns and the fastest of several rounds counts: CPU time of one thread, or the GPU's own clock. Memory is the
growth of the peak of resident memory.
"""

import argparse
import json
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from matplotlib.figure import Figure

from model.config import ModelConfig, PositionConfig
from model.kernels import attend
from model.pattern import Place
from model.positions import reading

TOKENS = 4096
KINDS = ("rope", "rerope", "leaky", "inverse leaky", "sliding window")
HEADS = {
    "gqa": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64},
    "mla": {"num_attention_heads": 4, "attention": "mla", "kv_lora_rank": 64, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32,
            "v_head_dim": 64},
}  # fmt: skip
GPU_HEADS = {
    "gqa-64": {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64},
    "gqa-128": {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128},
    "mla": {"num_attention_heads": 16, "attention": "mla", "kv_lora_rank": 512, "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64, "v_head_dim": 128},
}  # fmt: skip


def position(kind: str, length: int) -> PositionConfig:
    """The map of a kind at a length: windows are a quarter of it, as the posts advise."""
    match kind:
        case "rope" | "sliding window":
            return PositionConfig()
        case "rerope":
            return PositionConfig(kind="rerope", window=length // 4)
        case "leaky":
            return PositionConfig(kind="leaky-rerope", window=length // 4, leak=16)
        case "inverse leaky":
            return PositionConfig(kind="leaky-rerope", window=length // 4, leak=1 / 16)
        case _:
            raise ValueError(f"kind '{kind}' is unknown; legal: {', '.join(KINDS)}")


def work(
    kind: str, heads: dict, length: int, batch: int, dtype: torch.dtype, device: str, compiled: bool = False
) -> Callable[[], None]:
    """Forward and backward of one layer's rotation and attention."""
    windowed = {"sliding_window": length // 4, "full_attention_layers": []} if kind == "sliding window" else {}
    config = ModelConfig(hidden_size=256, **heads, **windowed)
    place = Place(config, 0)
    how = reading(position(kind, length), config, batch, length, None, device, dtype, length)
    n = config.num_attention_heads
    k = n if config.attention == "mla" else config.kv_heads
    sizes = ((n, config.head_size), (k, config.head_size), (k, config.value_size))
    q, k_, v = (torch.randn(batch, length, *size, dtype=dtype, device=device, requires_grad=True) for size in sizes)
    nope = config.head_size - config.rotary_size
    window = place.window(how)

    def turned(x: torch.Tensor, y: torch.Tensor) -> object:
        parts = place.heads(x[..., nope:], y[..., nope:], v, how, far=window is not None)
        if not nope:
            return parts
        names = {"near_q": x, "near_k": y, "far_q": x, "far_k": y}
        joined = {
            name: torch.cat((whole[..., :nope], part), dim=-1)
            for name, whole in names.items()
            if (part := getattr(parts, name)) is not None
        }
        return type(parts)(v=v, **joined)

    def run() -> None:
        attend(turned(q, k_), config.head_size**-0.5, window, compiled=compiled).sum().backward()  # type: ignore[arg-type]

    return run


def seconds(run: Callable[[], None], device: str) -> float:
    """Of one call: this thread's CPU time, or the GPU's."""
    if device == "cpu":
        begin = time.thread_time()
        run()
        return time.thread_time() - begin
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def compare(heads: dict, length: int, dtype: torch.dtype, device: str, rounds: int, compiled: bool) -> dict[str, float]:
    """Seconds of each kind, the best of several rounds in turn."""
    batch = max(1, TOKENS // length)
    runs = {kind: work(kind, heads, length, batch, dtype, device, compiled) for kind in KINDS}
    best: dict[str, float] = {}
    for _ in range(rounds + 1):  # the first round warms up; it can only be slower
        for kind, run in runs.items():
            best[kind] = min(best.get(kind, float("inf")), seconds(run, device))
    return best


def memory(kind: str, length: int) -> int:
    """Growth of the peak memory in one forward and backward (bytes)."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64}
    work(kind, heads, 1024, 1, torch.float32, "cpu")()  # what is loaded at first use
    run = work(kind, heads, length, 1, torch.float32, "cpu")
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = peak_bytes()
    run()
    return peak_bytes() - before


def memories(kind: str, lengths: list[int]) -> dict[int, int]:
    """The same by length, each in a process of its own: what the heap has kept from earlier work would not count."""
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as processes:
        return dict(zip(lengths, processes.map(memory, [kind] * len(lengths), lengths), strict=True))


def peak_bytes() -> int:
    """Peak of resident memory since it was last forgotten."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def table(records: list[dict], kinds: tuple[str, ...]) -> list[str]:
    """Markdown rows of ratios to RoPE."""
    lines = ["| heads | numbers | tokens | rope (ms) | " + " | ".join(kinds[1:]) + " |", "|---" * (len(kinds) + 3) + "|"]
    for record in records:
        base = record["seconds"]["rope"]
        ratios = " | ".join(f"{record['seconds'][kind] / base:.2f}" for kind in kinds[1:])
        lines.append(f"| {record['heads']} | {record['dtype']} | {record['length']:,} | {base * 1e3:.1f} | {ratios} |")
    return lines


def draw(path: Path, records: list[dict]) -> None:
    """Ratio against length for every kind of heads and numbers, of inverse Leaky ReRoPE."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name in sorted({(record["heads"], record["dtype"]) for record in records}):
        own = [record for record in records if (record["heads"], record["dtype"]) == name]
        ratios = [record["seconds"]["inverse leaky"] / record["seconds"]["rope"] for record in own]
        axes.plot([record["length"] for record in own], ratios, marker="o", label=" ".join(name))
    axes.axhline(1, color="grey", linewidth=1)
    axes.set(xscale="log", xlabel="tokens of a sequence", ylabel="time against plain RoPE")
    axes.set_title("inverse Leaky ReRoPE, w = L/4")
    axes.set_xticks([record["length"] for record in own], [str(record["length"]) for record in own])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=150)


def write(output: Path, device: str, compiled: bool, records: list[dict], grown: dict[int, int]) -> None:
    """Figures, table and plot."""
    output.mkdir(parents=True, exist_ok=True)
    name = f"attention_{device}" + ("_compiled" if compiled else "")
    where = torch.cuda.get_device_name() if device == "cuda" else "one CPU thread" + (", compiled kernel" if compiled else "")
    (output / f"{name}.json").write_text(json.dumps({"on": where, "records": records, "peak_bytes": grown}, indent=1))
    draw(output / f"{name}.png", records)
    lines = [f"Measured on {where}, torch {torch.__version__}. Ratios to plain RoPE, forward and backward.", ""]
    lines += table(records, KINDS)
    if grown:
        lines += ["", "| tokens, inverse leaky, 2 heads of 64, fp32 | peak memory (MB) |", "|---|---|"]
        lines += [f"| {length:,} | {used / 1e6:.0f} |" for length, used in grown.items()]
    (output / f"{name}.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    """Measure, then write figures, table and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--compiled", action="store_true", help="on a CPU: as where blocks are compiled (bf16)")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    gpu = options.device == "cuda"
    lengths = (4096, 8192, 16384, 32768) if gpu else (256, 512, 1024, 2048, 4096)
    records = []
    for dtype in (torch.bfloat16,) if gpu or options.compiled else (torch.float32, torch.bfloat16):
        for name, heads in (GPU_HEADS if gpu else HEADS).items():
            for length in lengths:
                found = compare(heads, length, dtype, options.device, options.rounds, options.compiled)
                records.append({"heads": name, "dtype": str(dtype)[6:], "length": length, "seconds": found})
                print(table(records[-1:], KINDS)[-1], flush=True)
    grown = {} if gpu or options.compiled else memories("inverse leaky", [4096, 8192, 16384])
    write(options.output, options.device, options.compiled, records, grown)


if __name__ == "__main__":
    main()
