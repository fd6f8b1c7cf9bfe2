"""Write the corpus and the runs of a version, which every later version must read. Run once, by the code of that version:

    cd tests/versions/0.1.0 && PYTHONPATH=CHECKOUT python ../make.py tiger lion fold

Each name is a configuration NAME.toml in the working directory, whose run.dir is NAME. The run is left as one that was stopped
in its middle, but for metrics.jsonl, which has every step.
"""

import random
import shutil
import subprocess
import sys
from pathlib import Path

WORDS = "def return import self for in range print lambda yield class while if else not None True is and or".split()  # noqa: SIM905
LAST = "step-00000012"
"""Checkpoint of the end of each run."""


def write_text(directory: Path) -> None:
    """40 documents of words of Python."""
    draw = random.Random(0)
    for number in range(40):
        lines = (" ".join(draw.choices(WORDS, k=draw.randint(3, 9))) for _ in range(draw.randint(5, 20)))
        (directory / f"{number:02d}.txt").write_text("\n".join(lines) + f"\n# {number}\n")


def tiglon(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "launch", *arguments], check=True)


def main() -> None:
    text = Path("text")
    text.mkdir()
    write_text(text)
    tiglon("tokenizer", "train", "text", "--vocab-size", "300", "--output", "corpus/tokenizer")
    fraction = ("--validation-fraction", "0.1")
    tiglon("prepare", "text", "--tokenizer", "corpus/tokenizer", "--output", "corpus", *fraction)
    shutil.rmtree(text)
    for name in sys.argv[1:]:
        tiglon("train", f"{name}.toml")
        shutil.rmtree(Path(name) / "checkpoints" / LAST)
        shutil.rmtree(Path(name) / "logs")
        (Path(name) / "checkpoints" / ".lock").unlink()


if __name__ == "__main__":
    main()
