"""Other trainers in this same Python, on the same network, tokens and number formats."""

import tempfile
from pathlib import Path

from benchmarks.contestants import CONTESTANTS, SHAPES, Trainer
from benchmarks.gpu.figures import Part
from benchmarks.gpu.steps import TINY

NAMES = {
    "1b": ("transformers, loop, compiled", "litgpt, compiled"),
    "8b": ("transformers, loop, layers compiled", "litgpt, compiled"),
}
"""At 8b the whole of transformers' network compiles for minutes."""


def measure_1b(part: Part) -> None:
    """At 2,048, as the step of 1B."""
    measure(part, "1b", 2048, 8, 8)


def measure_8b(part: Part) -> None:
    """At 4,096, without recomputation where that fits."""
    measure(part, "8b", 4096, 2, 6)


def measure(part: Part, shape: str, length: int, batch: int, steps: int) -> None:
    """Every peer, alone on the device."""
    model = TINY if part.tiny else SHAPES[shape].model()
    length = 64 if part.tiny else length
    job = {"model": model, "length": length, "batch": batch, "device": part.device.type, "learning_rate": 3e-4}
    for name in NAMES[shape]:
        contestant = next(one for one in CONTESTANTS if one.name == name)
        with tempfile.TemporaryDirectory(dir=part.scratch) as folder:
            trainer = Trainer(contestant, job, Path(folder), here=True, frugal=True)
            trainer.start()
            trainer.warm_up(2)
            for _ in range(3):
                trainer.round(2 if part.tiny else steps)
            row = trainer.row({}, {})
            if trainer.log.exists() and trainer.reason:
                print(trainer.log.read_text()[-4000:], flush=True)
            trainer.stop()
        missing = "reason" in row and row["reason"].startswith("ModuleNotFoundError")
        told = {
            "reason": "not_run" if missing else "error",
            "tokens_per_second": "tokens_per_second",
            "memory_bytes": "bytes",
            "recompute": "recompute",
        }
        told |= {"rounds": "rounds", "last_loss": "loss", "first_step_seconds": "first_step_seconds", "state": "state"}
        part.say(
            "peer", shape=shape, length=length, batch=batch, name=name, **{told[key]: row[key] for key in row if key in told}
        )
