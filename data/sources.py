"""Text in: plain text, JSON lines and Parquet, local or in an object store, read in batches of bounded memory.

The input is cut into tasks, each a stretch of files that one process reads from end to end. The cut depends on the input
alone, so neither the number of workers nor a restart changes which document lands where.
"""

import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import IO, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from data import storage

OnError = Literal["stop", "skip"]
TextDocuments = Literal["file", "line", "paragraph"]
Kind = Literal["parquet", "jsonl", "text"]
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
ENDINGS: dict[str, Kind] = {
    ".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl",
    ".txt": "text", ".md": "text", ".rst": "text", ".py": "text",
}  # fmt: skip


@dataclass(frozen=True)
class Reading:
    """How text is found in files."""

    field: str = "text"  # Parquet column or JSON field
    text_documents: TextDocuments = "file"  # what a document of a plain-text file is
    on_error: OnError = "stop"
    max_document_bytes: int = 64 << 20


@dataclass(frozen=True)
class Piece:
    """Part of one file: bytes [start, stop) of a text file, or row groups [start, stop) of a Parquet file."""

    address: str
    kind: Kind
    compression: str | None
    start: int
    stop: int
    bytes: int


@dataclass
class Faults:
    """What was left out while reading, counted by reason; `stop` turns the first into an error."""

    on_error: OnError = "stop"
    counts: Counter = field(default_factory=Counter)

    def add(self, reason: str, place: str, remedy: str) -> None:
        """Count a bad document, or raise ValueError about it when on_error is "stop"."""
        if self.on_error == "stop":
            raise ValueError(f"{place}: {reason}; {remedy}, or leave such documents out with --on-error skip")
        self.counts[reason] += 1


def plan_tasks(inputs: list[str], reading: Reading, task_bytes: int | None = None) -> list[list[Piece]]:
    """Cut all inputs into tasks of about `task_bytes` of input, in a fixed order.

    The default size is a 64th of the input, at least 1 MiB and at most 256 MiB. Raises FileNotFoundError or ValueError
    for inputs that do not exist, that nobody can read, or that are given twice.
    """
    files = [(storage.reopen(address, path), size) for address in inputs for path, size in storage.list_files(address)]
    twice = [name for name, count in Counter(name for name, _ in files).items() if count > 1]
    if twice:
        raise ValueError(f"'{twice[0]}' is given twice: name each input once, so that no document is counted double")
    size = task_bytes or min(max(sum(size for _, size in files) // 64, 1 << 20), 256 << 20)
    tasks: list[list[Piece]] = []
    room = 0
    for address, bytes_ in files:
        for piece in _pieces(address, bytes_, reading, size):
            if room < piece.bytes or not tasks:
                tasks.append([])
                room = max(size, piece.bytes)
            tasks[-1].append(piece)
            room -= piece.bytes
    return tasks


def _pieces(address: str, size: int, reading: Reading, task_bytes: int) -> Iterator[Piece]:
    kind, compression = _kind(address)
    if kind == "parquet":
        yield from _row_groups(address, size, reading, task_bytes)
    elif compression or (kind == "text" and reading.text_documents != "line"):
        yield Piece(address, kind, compression, 0, size, size)
    else:
        for start in range(0, size, task_bytes):
            stop = min(start + task_bytes, size)
            yield Piece(address, kind, None, start, stop, stop - start)


def _kind(address: str) -> tuple[Kind, str | None]:
    name = address.partition("?")[0].lower()
    compression = next((value for ending, value in COMPRESSIONS.items() if name.endswith(ending)), None)
    if compression:
        name = name.rsplit(".", 1)[0]
    for ending, kind in ENDINGS.items():
        if name.endswith(ending) and not (compression and kind == "parquet"):
            return kind, compression
    raise ValueError(
        f"'{address}' is of no known kind: wanted {', '.join(ENDINGS)} (text and JSON also as {', '.join(COMPRESSIONS)});"
        " rename it, or leave it out with a pattern such as 'folder/*.parquet'"
    )


def _row_groups(address: str, size: int, reading: Reading, task_bytes: int) -> Iterator[Piece]:
    """Runs of row groups. A file that cannot be read stays one piece: reading it counts it, once, as --on-error says."""
    try:
        with _parquet(address) as file:
            metadata, fault = file.metadata, column_fault(file.schema_arrow, reading.field)
            sizes = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
    except (pa.ArrowException, OSError) as reason:
        storage.stop_at_outage(address, reason)
        fault, sizes = f"it is not a readable Parquet file ({reason})", []
    if fault:
        if reading.on_error == "stop":
            raise ValueError(f"'{address}': {fault}; repair it, choose with --field, or use --on-error skip")
        sizes = [size]
    start = weight = 0
    for group, bytes_ in enumerate(sizes):
        if weight and weight + bytes_ > task_bytes:
            yield Piece(address, "parquet", None, start, group, weight)
            start, weight = group, 0
        weight += bytes_
    if sizes:
        yield Piece(address, "parquet", None, start, len(sizes), weight)


def column_fault(schema: pa.Schema, column: str) -> str:
    """What is wrong with the text column of a schema; "" when nothing is."""
    if column not in schema.names:
        return f"it has no column '{column}' but {', '.join(schema.names)}"
    kind = schema.field(column).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    return "" if any(test(kind) for test in texts) else f"column '{column}' holds {kind}, not text"


def _parquet(address: str) -> pq.ParquetFile:
    system, path = storage.locate(address)
    return pq.ParquetFile(system.open_input_file(path), pre_buffer=False, buffer_size=1 << 20)


def read_documents(piece: Piece, reading: Reading, faults: Faults) -> Iterator[str]:
    """The documents of a piece in order; bad ones go to `faults`. Empty documents are counted and left out."""
    match piece.kind:
        case "parquet":
            raw = _parquet_rows(piece, reading, faults)
        case "jsonl":
            raw = _json_rows(piece, reading, faults)
        case "text":
            raw = _text_rows(piece, reading, faults)
    for place, value in raw:
        text = _text(place, value, reading, faults)
        if text:
            yield text


def _text(place: str, value: object, reading: Reading, faults: Faults) -> str:
    """A document as text that is valid UTF-8 and not too long; "" when it is left out."""
    if value is None or value == "" or value == b"":
        faults.counts["null" if value is None else "empty"] += 1
        return ""
    if not isinstance(value, str | bytes):
        faults.add("not text", place, f"field '{reading.field}' holds {type(value).__name__}")
        return ""
    try:
        data = value.encode() if isinstance(value, str) else value
        text = value if isinstance(value, str) else value.decode()
    except UnicodeError:
        faults.add("invalid UTF-8", place, "convert the text to UTF-8")
        return ""
    if len(data) > reading.max_document_bytes:
        faults.add("document too long", place, f"it has more than {reading.max_document_bytes} bytes (--max-document-bytes)")
        return ""
    return text


def _parquet_rows(piece: Piece, reading: Reading, faults: Faults) -> Iterator[tuple[str, object]]:
    try:
        with _parquet(piece.address) as file:
            if fault := column_fault(file.schema_arrow, reading.field):
                faults.add("no text column", piece.address, fault)
                return
            row, groups = 0, list(range(piece.start, piece.stop))
            for batch in file.iter_batches(batch_size=64, row_groups=groups, columns=[reading.field], use_threads=False):
                for value in _as_bytes(batch.column(0)).to_pylist():
                    yield f"{piece.address} row {row} from row group {piece.start} on", value
                    row += 1
    except (pa.ArrowException, OSError) as reason:
        storage.stop_at_outage(piece.address, reason)
        faults.add("unreadable Parquet", piece.address, f"{reason}; repair the file")


def _as_bytes(column: pa.Array) -> pa.Array:
    """Text as bytes, so that invalid UTF-8 is our own finding and not an exception of pyarrow's."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    large = pa.types.is_large_string(column.type) or pa.types.is_large_binary(column.type)
    return column.cast(pa.large_binary() if large else pa.binary())


def _json_rows(piece: Piece, reading: Reading, faults: Faults) -> Iterator[tuple[str, object]]:
    for place, line in _lines(piece, reading, faults):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            faults.add("broken JSON", place, "repair the line")
            continue
        if not isinstance(record, dict) or reading.field not in record:
            faults.add("missing field", place, f"it has no field '{reading.field}': choose with --field")
            continue
        yield place, record[reading.field]


def _text_rows(piece: Piece, reading: Reading, faults: Faults) -> Iterator[tuple[str, object]]:
    if reading.text_documents == "line":
        for place, line in _lines(piece, reading, faults):
            yield place, line.rstrip(b"\n").removesuffix(b"\r")
        return
    if reading.text_documents == "file":
        with _opened(piece) as file:
            data = _read(file.read, reading.max_document_bytes + 1, piece, faults)
        yield piece.address, data
        return
    paragraph: list[bytes] = []
    place = piece.address
    for here, line in _lines(piece, reading, faults):
        if line.strip():
            place = place if paragraph else here
            paragraph.append(line)
        elif paragraph:
            yield place, b"".join(paragraph).rstrip(b"\n")
            paragraph = []
    if paragraph:
        yield place, b"".join(paragraph).rstrip(b"\n")


def _lines(piece: Piece, reading: Reading, faults: Faults) -> Iterator[tuple[str, bytes]]:
    """Lines that begin in [start, stop) of the piece. A line longer than a document may be is a fault."""
    limit = 2 * reading.max_document_bytes + 1024
    with _opened(piece) as file:
        at = piece.start
        if piece.start > 0:
            file.seek(piece.start - 1)
            at = piece.start - 1 + _skip_line(file, piece.stop - piece.start)
        while piece.compression or at < piece.stop:
            line = _read(file.readline, limit, piece, faults)
            if not line:
                return
            place = f"{piece.address} byte {at}"
            at += len(line)
            if len(line) >= limit and not line.endswith(b"\n"):
                at += _skip_line(file)
                faults.add(
                    "document too long", place, f"it has more than {reading.max_document_bytes} bytes (--max-document-bytes)"
                )
                continue
            yield place, line


def _skip_line(file: IO[bytes], enough: int | None = None) -> int:
    """Read on behind the next newline, or until `enough` bytes, in bounded steps; the bytes read."""
    skipped = 0
    while part := file.readline(1 << 20):
        skipped += len(part)
        if part.endswith(b"\n") or (enough is not None and skipped > enough):
            break
    return skipped


def _read(read: Callable[[int], bytes], limit: int, piece: Piece, faults: Faults) -> bytes:
    """What `file.read` or `file.readline` gives; nothing, and a fault, where the file is broken."""
    try:
        return read(limit)
    except (OSError, EOFError, pa.ArrowException) as reason:
        storage.stop_at_outage(piece.address, reason)
        faults.add("unreadable file", piece.address, f"{reason}; repair the file")
        return b""


def _opened(piece: Piece) -> IO[bytes]:
    system, path = storage.locate(piece.address)
    with storage.naming(piece.address):
        if piece.compression:
            return io.BufferedReader(system.open_input_stream(path, compression=piece.compression), 1 << 20)  # type: ignore[arg-type]
        return io.BufferedReader(system.open_input_file(path), 1 << 20)  # type: ignore[arg-type]
