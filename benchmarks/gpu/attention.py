"""Every position map, a window and packed documents against plain RoPE, on every backend that supports it."""

import torch

from benchmarks import attention
from benchmarks.gpu.figures import Part

LENGTHS = (8192, 32768)
ROUNDS = 5


def measure(part: Part) -> None:
    """Time each backend and print the table of model/attention/kernels/dispatch.py as measured here; then time tiglon's choice
    by the table in the source."""
    torch._dynamo.config.recompile_limit = 64  # each kind and length recompiles the same function
    heads = {"gqa": attention.HEADS["gqa"]} if part.tiny else attention.GPU_HEADS
    lengths, rounds = ((256,), 1) if part.tiny else (LENGTHS, ROUNDS)
    found: dict[str, dict[int, attention.Times]] = {}

    def by_backend(name: str, length: int) -> dict[str, attention.Times]:
        found.setdefault(name, {})[length] = attention.backends(heads[name], length, torch.bfloat16, part.device.type, rounds)
        return {"seconds": found[name][length]}

    def table() -> dict[str, object]:
        rows = attention.measured_table(found).items()
        return {"fastest_from_a_reach_on": {f"{kind}{', narrow values' * narrow}": row for (kind, narrow), row in rows}}

    for length in lengths:
        for name in heads:
            part.attempt("backends", lambda n=name, t=length: by_backend(n, t), heads=name, length=length)
        part.attempt("table", table, lengths=lengths[: lengths.index(length) + 1])  # of what is measured, should time run out
    for length in lengths:
        for name, sizes in heads.items():
            part.attempt("ratios", lambda n=name, s=sizes, t=length: ratios(part, s, t, rounds), heads=name, length=length)


def ratios(part: Part, heads: dict, length: int, rounds: int) -> dict[str, float]:
    """Milliseconds of RoPE, and the others' times over it."""
    torch._dynamo.reset()
    times = attention.compare(heads, length, torch.bfloat16, part.device.type, rounds, True, attention.GPU_KINDS)
    return {"rope_ms": round(1e3 * times["rope"], 3)} | {
        kind: round(seconds / times["rope"], 3) for kind, seconds in times.items() if kind != "rope"
    }
