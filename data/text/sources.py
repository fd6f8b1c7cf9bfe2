"""Find the input files and cut them into tasks.

A task is a list of consecutive parts of files that one process reads from beginning to end. The cut depends on the files
and the task size only, so neither the number of workers nor a restart changes which shard a document is written to.
"""

from collections import Counter
from collections.abc import Iterator

import pyarrow as pa

from data import storage
from data.text.formats import FileKind, InputPart, TextFormat, column_fault, open_parquet

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
ENDINGS: dict[str, FileKind] = {
    ".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl",
    ".txt": "text", ".md": "text", ".rst": "text", ".py": "text",
}  # fmt: skip


def plan_tasks(inputs: list[str], text_format: TextFormat, task_bytes: int | None = None) -> list[list[InputPart]]:
    """Cut all inputs into tasks of about `task_bytes` of input, in a fixed order.

    The default size is a 64th of the input, at least 1 MiB and at most 256 MiB. Raises FileNotFoundError for an input that
    does not exist, ValueError for one of unknown format, without the column of text, or given twice.
    """
    files = [(storage.listed_address(address, path), size) for address in inputs for path, size in storage.list_files(address)]
    repeated = [name for name, count in Counter(name for name, _ in files).items() if count > 1]
    if repeated:
        raise ValueError(f"'{repeated[0]}' is given twice: name each input once, so that no document is counted double")
    size = task_bytes or min(max(sum(size for _, size in files) // 64, 1 << 20), 256 << 20)
    tasks: list[list[InputPart]] = []
    space_left = 0
    for address, bytes_ in files:
        for part in _cut(address, bytes_, text_format, size):
            if space_left < part.bytes or not tasks:
                tasks.append([])
                space_left = max(size, part.bytes)
            tasks[-1].append(part)
            space_left -= part.bytes
    return tasks


def _cut(address: str, size: int, text_format: TextFormat, task_bytes: int) -> Iterator[InputPart]:
    kind, compression = _kind(address)
    if kind == "parquet":
        yield from _row_groups(address, size, text_format, task_bytes)
    elif compression or (kind == "text" and text_format.text_documents != "line"):
        yield InputPart(address, kind, compression, 0, size, size)
    else:
        for start in range(0, size, task_bytes):
            stop = min(start + task_bytes, size)
            yield InputPart(address, kind, None, start, stop, stop - start)


def _kind(address: str) -> tuple[FileKind, str | None]:
    name = address.partition("?")[0].lower()
    compression = next((value for ending, value in COMPRESSIONS.items() if name.endswith(ending)), None)
    if compression:
        name = name.rsplit(".", 1)[0]
    for ending, kind in ENDINGS.items():
        if name.endswith(ending) and not (compression and kind == "parquet"):
            return kind, compression
    raise ValueError(
        f"'{address}' is of no known kind: use {', '.join(ENDINGS)} (text and JSON also as {', '.join(COMPRESSIONS)});"
        " rename it, or leave it out with a pattern such as 'folder/*.parquet'"
    )


def _row_groups(address: str, size: int, text_format: TextFormat, task_bytes: int) -> Iterator[InputPart]:
    """Runs of row groups. With on_error "skip" an unreadable file is one part, so that `read_documents` counts it once."""
    try:
        with open_parquet(address) as file:
            metadata, fault = file.metadata, column_fault(file.schema_arrow, text_format.field)
            sizes = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
    except (pa.ArrowException, OSError) as reason:
        storage.raise_outage(address, reason)
        fault, sizes = f"it is not a readable Parquet file ({reason})", []
    if fault:
        if text_format.on_error == "stop":
            raise ValueError(f"'{address}': {fault}; repair it, choose with --field, or use --on-error skip")
        sizes = [size]
    start = weight = 0
    for group, bytes_ in enumerate(sizes):
        if weight and weight + bytes_ > task_bytes:
            yield InputPart(address, "parquet", None, start, group, weight)
            start, weight = group, 0
        weight += bytes_
    if sizes:
        yield InputPart(address, "parquet", None, start, len(sizes), weight)
