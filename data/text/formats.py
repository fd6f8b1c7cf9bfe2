"""Read the documents of one part of a file: Parquet, JSON lines or plain text, local or in an object store.

Memory is bounded by the longest document allowed (`TextFormat.max_document_bytes`), not by the size of the file.
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
FileKind = Literal["parquet", "jsonl", "text"]


@dataclass(frozen=True)
class TextFormat:
    """Where the documents are in a file, and what happens to those that cannot be read."""

    field: str = "text"  # Parquet column or JSON field
    text_documents: TextDocuments = "file"  # what a document of a plain-text file is
    on_error: OnError = "stop"  # "skip" leaves out and counts what cannot be read
    max_document_bytes: int = 64 << 20  # of UTF-8; a longer document cannot be read


@dataclass(frozen=True)
class InputPart:
    """Part of a file: lines that begin in bytes [start, stop) of a text file, or row groups [start, stop) of a Parquet file."""

    address: str
    kind: FileKind
    compression: str | None  # as pyarrow names it
    start: int
    stop: int
    bytes: int  # of input, for the size of tasks and for progress


@dataclass
class RejectedDocuments:
    """Documents left out, counted by reason; with `on_error` "stop" the first one is an error."""

    on_error: OnError = "stop"
    counts: Counter = field(default_factory=Counter)

    def add(self, reason: str, location: str, remedy: str) -> None:
        """Count a bad document, or raise ValueError about it when on_error is "stop"."""
        if self.on_error == "stop":
            raise ValueError(f"{location}: {reason}; {remedy}, or leave such documents out with --on-error skip")
        self.counts[reason] += 1


def column_fault(schema: pa.Schema, column: str) -> str:
    """Why a Parquet column cannot be read as text; "" if it can."""
    if column not in schema.names:
        return f"it has no column '{column}' but {', '.join(schema.names)}"
    kind = schema.field(column).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    return "" if any(test(kind) for test in texts) else f"column '{column}' holds {kind}, not text"


def open_parquet(address: str) -> pq.ParquetFile:
    """Open a Parquet file. Raises OSError or pyarrow.ArrowException, which do not always say which file."""
    system, path = storage.locate(address)
    return pq.ParquetFile(system.open_input_file(path), pre_buffer=False, buffer_size=1 << 20)


def read_documents(part: InputPart, text_format: TextFormat, rejected: RejectedDocuments) -> Iterator[str]:
    """The documents of a part, in order. Null, empty and unreadable ones are left out and counted in `rejected`.

    Raises ValueError for the first unreadable document if `on_error` is "stop", OSError for a store that does not respond.
    """
    match part.kind:
        case "parquet":
            values = _parquet_rows(part, text_format, rejected)
        case "jsonl":
            values = _json_rows(part, text_format, rejected)
        case "text":
            values = _text_rows(part, text_format, rejected)
    for location, value in values:
        text = _valid_text(location, value, text_format, rejected)
        if text:
            yield text


def _valid_text(location: str, value: object, text_format: TextFormat, rejected: RejectedDocuments) -> str:
    """A document as text that is valid UTF-8 and not too long; "" when it is left out."""
    if value is None or value == "" or value == b"":
        rejected.counts["null" if value is None else "empty"] += 1
        return ""
    if not isinstance(value, str | bytes):
        rejected.add("not text", location, f"field '{text_format.field}' holds {type(value).__name__}")
        return ""
    try:
        data = value.encode() if isinstance(value, str) else value
        text = value if isinstance(value, str) else value.decode()
    except UnicodeError:
        rejected.add("invalid UTF-8", location, "convert the text to UTF-8")
        return ""
    if len(data) > text_format.max_document_bytes:
        rejected.add(
            "document too long", location, f"it has more than {text_format.max_document_bytes} bytes (--max-document-bytes)"
        )
        return ""
    return text


def _parquet_rows(part: InputPart, text_format: TextFormat, rejected: RejectedDocuments) -> Iterator[tuple[str, object]]:
    try:
        with open_parquet(part.address) as file:
            if fault := column_fault(file.schema_arrow, text_format.field):
                rejected.add("no text column", part.address, fault)
                return
            row, groups = 0, list(range(part.start, part.stop))
            for batch in file.iter_batches(batch_size=64, row_groups=groups, columns=[text_format.field], use_threads=False):
                for value in _as_bytes(batch.column(0)).to_pylist():
                    yield f"{part.address} row {row} from row group {part.start} on", value
                    row += 1
    except (pa.ArrowException, OSError) as reason:
        storage.raise_outage(part.address, reason)
        rejected.add("unreadable Parquet", part.address, f"{reason}; repair the file")


def _as_bytes(column: pa.Array) -> pa.Array:
    """Text as bytes, so that invalid UTF-8 is found document by document, not as an exception of pyarrow for a whole batch."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    large = pa.types.is_large_string(column.type) or pa.types.is_large_binary(column.type)
    return column.cast(pa.large_binary() if large else pa.binary())


def _json_rows(part: InputPart, text_format: TextFormat, rejected: RejectedDocuments) -> Iterator[tuple[str, object]]:
    for location, line in _lines(part, text_format, rejected):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            rejected.add("broken JSON", location, "repair the line")
            continue
        if not isinstance(record, dict) or text_format.field not in record:
            rejected.add("missing field", location, f"it has no field '{text_format.field}': choose with --field")
            continue
        yield location, record[text_format.field]


def _text_rows(part: InputPart, text_format: TextFormat, rejected: RejectedDocuments) -> Iterator[tuple[str, object]]:
    if text_format.text_documents == "line":
        for location, line in _lines(part, text_format, rejected):
            yield location, line.rstrip(b"\n").removesuffix(b"\r")
        return
    if text_format.text_documents == "file":
        with _open(part) as file:
            data = _read(file.read, text_format.max_document_bytes + 1, part, rejected)
        yield part.address, data
        return
    paragraph: list[bytes] = []
    location = part.address
    for line_location, line in _lines(part, text_format, rejected):
        if line.strip():
            location = location if paragraph else line_location
            paragraph.append(line)
        elif paragraph:
            yield location, b"".join(paragraph).rstrip(b"\n")
            paragraph = []
    if paragraph:
        yield location, b"".join(paragraph).rstrip(b"\n")


def _lines(part: InputPart, text_format: TextFormat, rejected: RejectedDocuments) -> Iterator[tuple[str, bytes]]:
    """(location, line with its newline) of the lines that begin in [start, stop); one longer than any document is rejected."""
    limit = 2 * text_format.max_document_bytes + 1024
    with _open(part) as file:
        offset = part.start
        if part.start > 0:
            file.seek(part.start - 1)
            offset = part.start - 1 + _skip_line(file, part.stop - part.start)
        while part.compression or offset < part.stop:
            line = _read(file.readline, limit, part, rejected)
            if not line:
                return
            location = f"{part.address} byte {offset}"
            offset += len(line)
            if len(line) >= limit and not line.endswith(b"\n"):
                offset += _skip_line(file)
                rejected.add(
                    "document too long",
                    location,
                    f"it has more than {text_format.max_document_bytes} bytes (--max-document-bytes)",
                )
                continue
            yield location, line


def _skip_line(file: IO[bytes], limit: int | None = None) -> int:
    """Skip to the end of the line, or past `limit` bytes, in bounded steps; the bytes skipped."""
    skipped = 0
    while chunk := file.readline(1 << 20):
        skipped += len(chunk)
        if chunk.endswith(b"\n") or (limit is not None and skipped > limit):
            break
    return skipped


def _read(read: Callable[[int], bytes], limit: int, part: InputPart, rejected: RejectedDocuments) -> bytes:
    """Up to `limit` bytes from `file.read` or `file.readline`; b"" and a rejection if the file cannot be read."""
    try:
        return read(limit)
    except (OSError, EOFError, pa.ArrowException) as reason:
        storage.raise_outage(part.address, reason)
        rejected.add("unreadable file", part.address, f"{reason}; repair the file")
        return b""


def _open(part: InputPart) -> IO[bytes]:
    system, path = storage.locate(part.address)
    with storage.named_errors(part.address):
        if part.compression:
            return io.BufferedReader(system.open_input_stream(path, compression=part.compression), 1 << 20)  # type: ignore[arg-type]
        return io.BufferedReader(system.open_input_file(path), 1 << 20)  # type: ignore[arg-type]
