"""The largest network that this device trains, by benchmarks/largest.py."""

from argparse import Namespace

from benchmarks import largest
from benchmarks.gpu.figures import Part


def measure(part: Part) -> None:
    """A few steps of it: it fits, and its peak stands beside the planner's."""
    given = Namespace(
        device=part.device.type, length=64 if part.tiny else 2048, vocab_size=512 if part.tiny else 32000, steps=3,
        memory_bytes=1e8 if part.tiny else 0, compile=True,
    )  # fmt: skip

    def trained() -> dict[str, object]:
        found = largest.measure(given)
        keys = ("parameters", "model", "planned_bytes", "peak_bytes", "bytes_per_parameter")
        keys += ("tokens_per_second", "mfu", "losses")
        return {key: found[key] for key in keys}

    part.attempt("largest", trained, length=given.length)
