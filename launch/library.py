"""A corpus that every computer with Python has: the source of its own standard library, as one Parquet file.

`python -m launch.library OUTPUT.parquet` writes it (columns `path` and `text`, one row a file).
"""

import sys
import sysconfig
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data import storage
from launch import program

FOREIGN = {"site-packages", "dist-packages"}
"""Folders inside the library's that hold other people's packages."""
ROWS_A_GROUP = 64
"""Files a row group, so that several workers can share the one Parquet file."""


def sources(library: Path) -> list[tuple[str, str]]:
    """(path, text) of the .py files that are UTF-8, in order of their paths."""
    found = []
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if FOREIGN & set(relative.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):  # the library's tests keep a few files broken on purpose
            continue
        if text.strip():
            found.append((relative.as_posix(), text))
    return found


def collect(output: Path, library: Path | None = None) -> tuple[int, int]:
    """Write the corpus, whole or not at all.

    Args:
        library: folder of the standard library; None = that of the running Python.

    Returns:
        Files and bytes of text.

    Raises:
        FileNotFoundError: this Python has no library in source form.
    """
    library = library or Path(sysconfig.get_paths()["stdlib"])
    found = sources(library)
    if not found:
        raise FileNotFoundError(f"{library} holds no Python source files; use a Python that came with its library")
    table = pa.table({"path": [path for path, _ in found], "text": [text for _, text in found]})
    written = pa.BufferOutputStream()
    pq.write_table(table, written, compression="zstd", row_group_size=ROWS_A_GROUP)
    storage.write_whole(str(output), written.getvalue())
    return len(found), sum(len(text.encode()) for _, text in found)


def main(arguments: list[str]) -> int:
    """`python -m launch.library OUTPUT.parquet`."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m launch.library OUTPUT.parquet", file=sys.stderr)
        return 2
    files, size = collect(Path(arguments[0]))
    print(f"wrote {arguments[0]}: {files:,} files of Python's standard library, {size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(program.run(lambda: main(sys.argv[1:])))
