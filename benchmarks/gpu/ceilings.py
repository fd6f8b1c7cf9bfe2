"""Peak rates of this GPU: matrix products, copies, attention, host memory; and which attention backend torch chooses."""

import time
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.figures import Part
from trainer.checkpoint.format import StagedTensor
from trainer.checkpoint.rectangles import Rectangle
from trainer.checkpoint.staging import Staging

PRODUCTS = (
    (8192, 8192, 8192), (8192, 4096, 28672), (8192, 14336, 4096), (8192, 4096, 6144), (8192, 4096, 4096), (8192, 4096, 128256),
)  # fmt: skip
"""Rows, inner size, columns: a square, and those of Llama 3 8B with 8,192 tokens."""
HEADS = ((2, 4096, 32, 8, 128, 128), (1, 16384, 32, 8, 128, 128), (8, 2048, 32, 4, 64, 64), (1, 8192, 16, 16, 192, 128))
"""Sequences, tokens, query heads, kv heads, head dim of queries, of values."""
BACKENDS = {
    SDPBackend.CUDNN_ATTENTION: "cudnn",
    SDPBackend.FLASH_ATTENTION: "flash",
    SDPBackend.EFFICIENT_ATTENTION: "memory efficient",
}
"""Name -> start of torch's warnings that say why the backend is not used."""


def measure(part: Part) -> None:
    """All measurements."""
    scale = 64 if part.tiny else 1
    part.attempt("sustained products", lambda: sustained(part, 8192 // scale, 0.2 if part.tiny else 4.0))
    part.attempt("copy", lambda: copied(part, (1 << 30) // scale**2))
    for shape in PRODUCTS:
        rows, inner, columns = (max(64, size // scale) for size in shape)
        part.attempt("product", lambda r=rows, i=inner, c=columns: product(part, r, i, c), shape=[rows, inner, columns])
    for shape in HEADS:
        small = (1, shape[1] // scale, *shape[2:]) if part.tiny else shape
        for backend in BACKENDS if part.device.type == "cuda" else (SDPBackend.FLASH_ATTENTION,):
            part.attempt("attention", lambda s=small, b=backend: attention(part, b, *s), shape=small, backend=backend.name)
        if part.device.type == "cuda":
            part.attempt("attention that torch chooses", lambda s=small: chosen(part, *s), shape=small)
    if part.device.type == "cuda":
        part.attempt("pinned host memory", lambda: pinned(part, 3_000_000_000))


def sustained(part: Part, size: int, for_seconds: float) -> dict[str, Any]:
    """Square products without a pause: the first run at the burst clock, the last at what the power limit allows."""
    a, b = (torch.randn(size, size, device=part.device).bfloat16() for _ in range(2))
    rates, begin, times = [], time.perf_counter(), 1 if part.tiny else 50
    while time.perf_counter() - begin < for_seconds:
        once = time.perf_counter()
        for _ in range(times):
            a @ b
        part.synchronize()
        rates.append(times * 2 * size**3 / (time.perf_counter() - once) / 1e12)
    return {"tflops_first": round(rates[0], 2), "tflops": round(rates[-1], 2)}


def product(part: Part, rows: int, inner: int, columns: int) -> dict[str, Any]:
    """One bfloat16 product, and the two of its backward."""
    x, weight = (
        torch.randn(rows, inner, device=part.device).bfloat16(),
        torch.randn(columns, inner, device=part.device).bfloat16(),
    )
    grad = torch.randn(rows, columns, device=part.device).bfloat16()
    work = 2 * rows * inner * columns / 1e12
    times = {
        "forward": part.seconds(lambda: x @ weight.t()),
        "input_gradient": part.seconds(lambda: grad @ weight),
        "weight_gradient": part.seconds(lambda: grad.t() @ x),
    }
    return {f"tflops_{name}": round(work / value, 2) for name, value in times.items()}


def copied(part: Part, elements: int) -> dict[str, Any]:
    """Device memory to device memory, what is read and what is written."""
    source = torch.randn(elements, device=part.device)
    target = torch.empty_like(source)
    return {"tb_per_second": round(2 * 4 * elements / part.seconds(lambda: target.copy_(source)) / 1e12, 3)}


def heads(part: Part, B: int, S: int, n: int, k: int, H: int, Hv: int) -> list[Tensor]:
    """Random queries, keys and values [B, heads, S, size]."""
    sizes = ((n, H), (k, H), (k, Hv))
    made = (torch.randn(B, S, *size, device=part.device, dtype=torch.bfloat16).transpose(1, 2) for size in sizes)
    return [x.requires_grad_() for x in made]


def attention(part: Part, backend: SDPBackend, B: int, S: int, n: int, k: int, H: int, Hv: int) -> dict[str, Any]:
    """Causal attention by one of torch's backends; FLOPs below the diagonal count."""
    q, key, v = heads(part, B, S, n, k, H, Hv)
    grad = torch.randn(B, S, n, Hv, device=part.device, dtype=torch.bfloat16).transpose(1, 2)
    with sdpa_kernel(backend):

        def forward() -> Tensor:
            return F.scaled_dot_product_attention(q, key, v, is_causal=True, enable_gqa=n != k)

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                out = forward()
            except RuntimeError as error:
                if "No available kernel" in str(error):
                    return {"not_served": reason(backend, [str(one.message) for one in caught])}
                raise
        there = part.seconds(forward)
        back = part.seconds(lambda: torch.autograd.grad(out, (q, key, v), grad, retain_graph=True))
    work = B * S * S * n * (H + Hv) / 1e12
    return {
        "forward_ms": round(1e3 * there, 3), "backward_ms": round(1e3 * back, 3),
        "tflops_forward": round(work / there, 2), "tflops_backward": round(2.5 * work / back, 2),
    }  # fmt: skip


def reason(backend: SDPBackend, words: list[str]) -> str:
    """The first line of the warning that follows the one which names a backend."""
    names = [word.lower().startswith(BACKENDS[backend]) and "kernel not used because" in word for word in words]
    told = words[names.index(True) + 1 :][:1] if True in names else []
    return told[0].splitlines()[0].partition(" (Triggered internally")[0][:200] if told else "torch does not say why"


def chosen(part: Part, B: int, S: int, n: int, k: int, H: int, Hv: int) -> dict[str, Any]:
    """The backend that torch chooses by default."""
    q, key, v = heads(part, B, S, n, k, H, Hv)
    names = {int(value): name for name, value in SDPBackend.__members__.items()}
    return {"backend": names.get(int(torch._fused_sdp_choice(q, key, v, is_causal=True, enable_gqa=n != k)))}


def pinned(part: Part, size: int) -> dict[str, Any]:
    """Host memory for checkpoints: seconds to allocate it, and to copy into it."""
    values = torch.empty(size, dtype=torch.uint8, device=part.device)
    piece, staging = [StagedTensor("x", (size,), Rectangle((0,), (size,)), values)], Staging()
    begin = time.perf_counter()
    staging.reserve(piece)
    staging.begin(piece)
    staging.copy(piece)
    first = time.perf_counter() - begin
    staging.begin(piece)
    begin = time.perf_counter()
    held = staging.copy(piece)[0].values
    return {
        "gb_per_second": round(size / (time.perf_counter() - begin) / 1e9, 2), "first_seconds": round(first, 2),
        "pinned": held.is_pinned(),
    }  # fmt: skip
