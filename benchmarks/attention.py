"""Cost of every position map against plain RoPE: rotation and attention, forward and backward, same shapes, one run.

    python -m benchmarks.attention --output docs/results             one CPU thread, fp32 and bf16
    python -m benchmarks.attention --output docs/results --compiled  the kernel of compiled blocks on a CPU, bf16
    python -m benchmarks.attention --output docs/results --device cuda
    python -m benchmarks.attention --backends                        every backend of a CPU, fp32 and bf16
    python -m benchmarks.attention --backends --device cuda          every backend that serves; the table FASTEST of
    model/attention/kernels/dispatch.py

Kinds are measured in turn and the fastest of several rounds counts: CPU time of one thread, or the GPU's own clock. On a GPU
the rotation is compiled, as in a compiled block. Memory is the growth of the peak of resident memory.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch
from matplotlib.figure import Figure

from model.attention.kernels import dispatch
from model.attention.kernels.dispatch import BACKENDS, FASTEST, AttentionBackend, MaskKind
from model.attention.kernels.inputs import AttentionInputs
from model.attention.kernels.operator import attend
from model.attention.sliding_window import LayerPositions
from model.config import ModelConfig
from model.positions.batch import TokenLayout, make_positions
from model.positions.config import PositionConfig

TOKENS = 4096
KINDS = ("rope", "rerope", "leaky", "inverse leaky", "sliding window")
PACKED = "documents"
"""Plain RoPE in documents of a quarter of the row, by which flash and FlexAttention are compared."""
GPU_KINDS = (*KINDS, PACKED)
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
        case "rope" | "sliding window" | "documents":
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
    layer_positions = LayerPositions(config, 0)
    bounds = torch.arange(0, batch * length + 1, length // 4, dtype=torch.int32) if kind == PACKED else None
    how = make_positions(position(kind, length), config, TokenLayout(batch, length, bounds), length, device, dtype)
    n = config.num_attention_heads
    k = n if config.attention == "mla" else config.kv_heads
    sizes = ((n, config.head_size), (k, config.head_size), (k, config.value_size))
    q, k_, v = (torch.randn(batch, length, *size, dtype=dtype, device=device, requires_grad=True) for size in sizes)
    nope = config.head_size - config.rotary_size
    window = layer_positions.kernel_window(how)

    def rotated(x: torch.Tensor, y: torch.Tensor) -> AttentionInputs:
        parts = layer_positions.rotate_inputs(x[..., nope:], y[..., nope:], v, how, far=window is not None)
        if not nope:
            return parts
        names = {"near_q": x, "near_k": y, "far_q": x, "far_k": y}
        joined = {
            name: torch.cat((whole[..., :nope], part), dim=-1)
            for name, whole in names.items()
            if (part := getattr(parts, name)) is not None
        }
        return AttentionInputs(v=v, **joined)

    def forward() -> torch.Tensor:
        return attend(rotated(q, k_), config.head_size**-0.5, window, how.documents, compiled)

    called = torch.compile(forward) if device == "cuda" else forward
    grad = torch.randn(batch, length, n, config.value_size, dtype=dtype, device=device)

    def run() -> None:
        torch.autograd.grad(called(), (q, k_, v), grad)

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


def compare(
    heads: dict, length: int, dtype: torch.dtype, device: str, rounds: int, compiled: bool, kinds: tuple[str, ...] = KINDS
) -> dict[str, float]:
    """Seconds of each kind, the best of several rounds in turn."""
    batch = max(1, TOKENS // length)
    runs = {kind: work(kind, heads, length, batch, dtype, device, compiled) for kind in kinds}
    best: dict[str, float] = {}
    for _ in range(rounds + 1):  # the first round warms up; it can only be slower
        for kind, run in runs.items():
            best[kind] = min(best.get(kind, float("inf")), seconds(run, device))
    return best


Times = dict[str, dict[str, float | str]]
"""Seconds by mask and by backend, beside those of plain RoPE; the error where there are none."""
KIND_OF_MASK: dict[str, MaskKind] = {"leaky": "two regions", "sliding window": "sliding window", PACKED: "packed documents"}
"""The kind that is timed for a row of FASTEST, and its mask."""
CPU_BACKENDS: dict[str, tuple[str, tuple[AttentionBackend, ...]]] = {
    "rope": ("cpu_dense", ("cpu_dense", "sdpa", "cpu_flash")),
    "leaky": ("cpu_tiled", ("cpu_tiled", "cpu_sdpa", "cpu_flash")),
    "sliding window": ("cpu_tiled", ("cpu_tiled", "cpu_sdpa", "cpu_flash")),
}
"""By kind: the backend that has a limit of tokens, and the backends of a CPU: up to the limit, above it, in compiled blocks."""


@contextmanager
def forced(kind: MaskKind, narrow: bool, backend: AttentionBackend) -> Iterator[None]:
    """One backend is the fastest for every length of a mask."""
    before = FASTEST[kind, narrow]
    FASTEST[kind, narrow] = {0: backend}
    torch._dynamo.reset()
    try:
        yield
    finally:
        FASTEST[kind, narrow] = before


def backends(heads: dict, length: int, dtype: torch.dtype, device: str, rounds: int) -> Times:
    """For every mask, seconds by backend, and of plain RoPE; the error of a backend that fails."""
    narrow = heads.get("attention") == "mla"
    times_of: Times = {}
    for name, kind in KIND_OF_MASK.items():
        times_of[kind] = {}
        for backend in served(kind, device):
            with forced(kind, narrow, backend):
                try:
                    times = compare(heads, length, dtype, device, rounds, True, ("rope", name))
                    times_of[kind] |= {"rope": times["rope"], backend: times[name]}
                except (RuntimeError, NotImplementedError) as error:
                    times_of[kind][backend] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return times_of


def served(kind: MaskKind, device: str) -> tuple[AttentionBackend, ...]:
    """Backends that serve a mask in compiled blocks of bfloat16: of a CPU there is one."""
    if device == "cpu":
        return ("cpu_flash",)
    cudnn: tuple[AttentionBackend, ...] = ("cudnn",) if kind != "packed documents" and dispatch.cudnn_serves() else ()
    return ("flash", *cudnn, "flex")


def cpu_backends(heads: dict, length: int, dtype: torch.dtype, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of every backend of a CPU that serves the dtype, by kind."""
    seconds_of: dict[str, dict[str, float]] = {}
    for kind, (limited, names) in CPU_BACKENDS.items():
        before, seconds_of[kind] = BACKENDS[limited], {}
        for name in names if dtype == torch.bfloat16 else names[:2]:
            BACKENDS[limited] = replace(before, max_tokens=None if name == limited else 0)
            seconds_of[kind][name] = compare(heads, length, dtype, "cpu", rounds, name == "cpu_flash", (kind,))[kind]
        BACKENDS[limited] = before
    return seconds_of


def measured_table(
    times_of: dict[str, dict[int, Times]],
) -> dict[tuple[MaskKind, bool], dict[int, AttentionBackend]]:
    """FASTEST as measured, from `backends` by name of the heads and by length: the least time over all heads with values as
    narrow.

    Of a sliding window, a quarter of the row is visible here.
    """
    table: dict[tuple[MaskKind, bool], dict[int, AttentionBackend]] = {}
    for kind in KIND_OF_MASK.values():
        for narrow in (False, True):
            rows = [by_length for name, by_length in times_of.items() if (name == "mla") == narrow]
            for length in sorted({length for by_length in rows for length in by_length}):
                ratios = [_against_best(by_length[length][kind]) for by_length in rows if length in by_length]
                common = set.intersection(*(set(each) for each in ratios)) if ratios else set()
                if not common:
                    continue
                best: AttentionBackend = min(common, key=lambda one: sum(each[one] for each in ratios))  # type: ignore[assignment]
                row = table.setdefault((kind, narrow), {})
                if not row or list(row.values())[-1] != best:
                    row[(length // 4 if kind == "sliding window" else length) if row else 0] = best
    return table


def _against_best(times: dict[str, float | str]) -> dict[str, float]:
    known = {name: value for name, value in times.items() if name != "rope" and isinstance(value, float)}
    return {name: value / min(known.values()) for name, value in known.items()}


def memory(kind: str, length: int) -> int:
    """Growth of the peak memory in one forward and backward (bytes)."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64}
    work(kind, heads, 1024, 1, torch.float32, "cpu")()  # what is loaded at first use
    run = work(kind, heads, length, 1, torch.float32, "cpu")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = peak_bytes()
    run()
    return peak_bytes() - before


def memories(kind: str, lengths: list[int]) -> dict[int, int]:
    """The same by length, each in a process of its own: memory that the heap keeps from earlier work would not count."""
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as processes:
        return dict(zip(lengths, processes.map(memory, [kind] * len(lengths), lengths), strict=True))


def peak_bytes() -> int:
    """Peak of resident memory since it was last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def table(records: list[dict], kinds: tuple[str, ...]) -> list[str]:
    """Markdown rows of ratios to RoPE."""
    lines = ["| heads | dtype | tokens | rope (ms) | " + " | ".join(kinds[1:]) + " |", "|---" * (len(kinds) + 3) + "|"]
    for record in records:
        base = record["seconds"]["rope"]
        ratios = " | ".join(f"{record['seconds'][kind] / base:.2f}" for kind in kinds[1:])
        lines.append(f"| {record['heads']} | {record['dtype']} | {record['length']:,} | {base * 1e3:.1f} | {ratios} |")
    return lines


def draw(path: Path, records: list[dict]) -> None:
    """Ratio against length for every kind of heads and dtype, of inverse Leaky ReRoPE."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name in sorted({(record["heads"], record["dtype"]) for record in records}):
        series = [record for record in records if (record["heads"], record["dtype"]) == name]
        ratios = [record["seconds"]["inverse leaky"] / record["seconds"]["rope"] for record in series]
        axes.plot([record["length"] for record in series], ratios, marker="o", label=" ".join(name))
    axes.axhline(1, color="grey", linewidth=1)
    axes.set(xscale="log", xlabel="tokens of a sequence", ylabel="time against plain RoPE")
    axes.set_title("inverse Leaky ReRoPE, w = L/4")
    axes.set_xticks([record["length"] for record in series], [str(record["length"]) for record in series])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=150)


def write(output: Path, device: str, compiled: bool, records: list[dict], peaks: dict[int, int]) -> None:
    """Write figures as JSON, table and plot."""
    output.mkdir(parents=True, exist_ok=True)
    name = f"attention_{device}" + ("_compiled" if compiled else "")
    where = torch.cuda.get_device_name() if device == "cuda" else "one CPU thread" + (", compiled kernel" if compiled else "")
    (output / f"{name}.json").write_text(json.dumps({"on": where, "records": records, "peak_bytes": peaks}, indent=1))
    draw(output / f"{name}.png", records)
    lines = [f"Measured on {where}, torch {torch.__version__}. Ratios to plain RoPE, forward and backward.", ""]
    lines += table(records, GPU_KINDS if device == "cuda" else KINDS)
    if peaks:
        lines += ["", "| tokens, inverse leaky, 2 heads of 64, fp32 | peak memory (MB) |", "|---|---|"]
        lines += [f"| {length:,} | {used / 1e6:.0f} |" for length, used in peaks.items()]
    (output / f"{name}.md").write_text("\n".join(lines) + "\n")


def print_backends(lengths: tuple[int, ...], device: str, rounds: int) -> None:
    """Time every backend, printing each as it is measured; of a GPU then the table."""
    if device == "cpu":
        for dtype, (name, heads), length in product((torch.float32, torch.bfloat16), HEADS.items(), lengths):
            for kind, seconds_of in cpu_backends(heads, length, dtype, rounds).items():
                shown = ", ".join(f"{backend} {1e3 * x:.0f} ms" for backend, x in seconds_of.items())
                print(f"{name}, {str(dtype)[6:]}, {length:,} tokens, {kind}: {shown}", flush=True)
        return
    times_of: dict[str, dict[int, Times]] = {}
    for name, heads in GPU_HEADS.items():
        for length in lengths:
            times = backends(heads, length, torch.bfloat16, device, rounds)
            times_of.setdefault(name, {})[length] = times
            for kind, each in times.items():
                shown = ", ".join(
                    f"{key} {1e3 * x:.2f} ms" if isinstance(x, float) else f"{key}: {x}" for key, x in each.items()
                )
                print(f"{name}, {length:,} tokens, {kind}: {shown}", flush=True)
    print(
        "FASTEST =", json.dumps({f"{kind}, narrow={narrow}": row for (kind, narrow), row in measured_table(times_of).items()})
    )


def main() -> None:
    """Measure, then write figures, table and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--compiled", action="store_true", help="on a CPU: as where blocks are compiled (bf16)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--backends", action="store_true", help="every backend that serves, and the table that follows")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 64  # each kind and length compiles the same function anew
    gpu = options.device == "cuda"
    lengths = (4096, 8192, 16384, 32768) if gpu else (256, 512, 1024, 2048, 4096)
    if options.backends:
        return print_backends(lengths, options.device, options.rounds)
    kinds = GPU_KINDS if gpu else KINDS
    records = []
    for dtype in (torch.bfloat16,) if gpu or options.compiled else (torch.float32, torch.bfloat16):
        for name, heads in (GPU_HEADS if gpu else HEADS).items():
            for length in lengths:
                times = compare(heads, length, dtype, options.device, options.rounds, gpu or options.compiled, kinds)
                records.append({"heads": name, "dtype": str(dtype)[6:], "length": length, "seconds": times})
                print(table(records[-1:], kinds)[-1], flush=True)
    peaks = {} if gpu or options.compiled else memories("inverse leaky", [4096, 8192, 16384])
    write(options.output, options.device, options.compiled, records, peaks)


if __name__ == "__main__":
    main()
