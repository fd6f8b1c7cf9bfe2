"""A corpus that every computer with Python has: the source of its standard library, as one Parquet file.

`python -m launch.standard_library OUTPUT.parquet` writes it (columns `path` and `text`, one row per file).
"""

import sys
import sysconfig
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data import storage
from launch import program

FOREIGN = {"site-packages", "dist-packages"}
"""Folders inside the library's that hold installed packages."""
ROW_GROUP_SIZE = 64
"""Rows (files) per row group: `tiglon prepare` shares out a Parquet file by row groups."""


def sources(library: Path) -> list[tuple[str, str]]:
    """(path in the library, text) of every .py file that is UTF-8 and not empty, sorted by path."""
    files = []
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if FOREIGN & set(relative.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):  # the library's tests keep a few files broken on purpose
            continue
        if text.strip():
            files.append((relative.as_posix(), text))
    return files


def collect(output: Path, library: Path | None = None) -> tuple[int, int]:
    """Write the corpus, completely or not at all.

    Args:
        library: folder of the standard library; None = that of the running Python.

    Returns:
        Files and bytes of text.

    Raises:
        FileNotFoundError: this Python's library has no source files.
    """
    library = library or Path(sysconfig.get_paths()["stdlib"])
    files = sources(library)
    if not files:
        raise FileNotFoundError(f"{library} holds no Python source files; use a Python that came with its library")
    table = pa.table({"path": [path for path, _ in files], "text": [text for _, text in files]})
    parquet = pa.BufferOutputStream()
    pq.write_table(table, parquet, compression="zstd", row_group_size=ROW_GROUP_SIZE)
    storage.write_atomic(str(output), parquet.getvalue())
    return len(files), sum(len(text.encode()) for _, text in files)


def main(arguments: list[str]) -> int:
    """Write the corpus to the path given; the exit status."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m launch.standard_library OUTPUT.parquet", file=sys.stderr)
        return 2
    files, size = collect(Path(arguments[0]))
    print(f"wrote {arguments[0]}: {files:,} files of Python's standard library, {size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    program.run(lambda: main(sys.argv[1:]))
