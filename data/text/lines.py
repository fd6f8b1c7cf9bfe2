"""Documents of plain text and JSON lines, as they are or compressed, in any encoding.

Text is handed on as UTF-8 with lines that end in a newline alone, without a byte-order mark.
"""

import codecs
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from data import storage
from data.text.faults import LFS_FAULT, READING_FAULTS, unreadable
from data.text.fields import keys_in, listed, value_in
from data.text.formats import InputPart, RejectedDocuments, TextFormat

MARKS = {
    codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
"""Byte-order marks; those of UTF-32 come before those of UTF-16, which they begin with."""
HEAD_BYTES = 4096
"""Of a file, to tell its encoding by."""
BUFFER_BYTES = 1 << 20
ARRAY_REMEDY = "it is a JSON array; give one object per line, as jq -c '.[]' writes them"


def json_rows(part: InputPart, text_format: TextFormat, rejected: RejectedDocuments) -> Iterator[tuple[str, object]]:
    """(location, value of the field) of each line of JSON."""
    for location, line in _lines(part, text_format, rejected):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode())
        except UnicodeError as reason:
            rejected.add("invalid UTF-8", location, encoding_remedy(reason))
            continue
        except (ValueError, RecursionError) as reason:
            if line.lstrip().startswith(b"["):
                rejected.add("JSON array", location, ARRAY_REMEDY)
            else:
                rejected.add("broken JSON", location, f"{_one_line(reason)}; repair it, each document is one line")
            continue
        try:
            yield location, _value(record, part.field)
        except LookupError as fault:
            reason, remedy = fault.args
            rejected.add(reason, location, remedy)


def _value(record: object, field: str) -> object:
    """The value of a field. Raises LookupError with a reason and a remedy."""
    if isinstance(record, list):
        raise LookupError("JSON array", ARRAY_REMEDY)
    if not isinstance(record, dict):
        raise LookupError("not an object", f"the line is a {type(record).__name__}; give an object with a field of text")
    try:
        return value_in(record, field)
    except KeyError:
        found = listed(keys_in(record))
        raise LookupError("missing field", f"it has no field '{field}' but {found}: choose with --field") from None


def text_rows(part: InputPart, text_format: TextFormat, rejected: RejectedDocuments) -> Iterator[tuple[str, bytes]]:
    """(location, document) of a part of plain text: the file, its lines, or its paragraphs, which blank lines separate."""
    if text_format.text_documents == "line":
        for location, line in _lines(part, text_format, rejected):
            yield location, _unix(line).removesuffix(b"\n")
        return
    if text_format.text_documents == "file":
        text, mark = None, _mark(text_format)
        with _at_most_one_fault(part, rejected), _opened(part, text_format, rejected) as file:
            # each line end may be a byte longer in the file than in the document
            text = _at_most(file, len(mark) + 2 * text_format.max_document_bytes + 1) if file else None
        if text is not None:
            yield part.address, _unix(text.removeprefix(mark))
        return
    yield from _paragraphs(part, text_format, rejected)


def _paragraphs(part: InputPart, text_format: TextFormat, rejected: RejectedDocuments) -> Iterator[tuple[str, bytes]]:
    """(location, paragraph) of a part; of one that is too long only its beginning, which is too long too."""
    paragraph, location, size = [], part.address, 0
    for line_location, line in _lines(part, text_format, rejected):
        if line.strip() or len(line) > text_format.max_document_bytes:
            location = location if paragraph else line_location
            if size <= text_format.max_document_bytes + 1:  # the newline at its end is none of it
                paragraph.append(_unix(line))
                size += len(paragraph[-1])
        elif paragraph:
            yield location, b"".join(paragraph).removesuffix(b"\n")
            paragraph, size = [], 0
    if paragraph:
        yield location, b"".join(paragraph).removesuffix(b"\n")


def encoding_remedy(reason: UnicodeError) -> str:
    """What to do about text that is not UTF-8."""
    where = ""
    if isinstance(reason, UnicodeDecodeError):
        where = f"byte 0x{reason.object[reason.start]:02x} at {reason.start} of it begins no character: "
    return f"{where}convert the file to UTF-8, or name its encoding, as in --encoding cp1252"


def foreign_encoding(head: bytes) -> str:
    """The encoding that the beginning of a file shows, by a byte-order mark or by zeros in every other byte; "" for UTF-8."""
    marked = next((name for mark, name in MARKS.items() if head.startswith(mark)), "")
    if marked:
        return "" if marked == "utf-8" else marked
    zeros = [head[parity::2].count(0) for parity in (0, 1)]
    if min(zeros) == 0 and 5 * max(zeros) > len(head) > 3:  # two bytes of five: text of mostly ASCII
        return "utf-16-le" if zeros[1] else "utf-16-be"
    return ""


def _other_mark(head: bytes, named: str) -> str:
    """The encoding that the byte-order mark of a file says, where it is another than the one that was named; else ""."""
    marked = next((name for mark, name in MARKS.items() if head.startswith(mark)), "")
    return "" if codecs.lookup(named).name.startswith(marked) else marked


def _lines(part: InputPart, text_format: TextFormat, rejected: RejectedDocuments) -> Iterator[tuple[str, bytes]]:
    """(location, line with its newline) of the lines that begin in [start, stop).

    Of a line that is longer than any document a beginning longer than any document is given, or it is rejected, if it is JSON.
    """
    limit = 2 * text_format.max_document_bytes + 1024
    is_whole = part.compression is not None or not text_format.is_utf_8  # and offsets are not those of the file
    with _at_most_one_fault(part, rejected), _opened(part, text_format, rejected) as file:
        if file is None:
            return
        offset = 0
        if part.start > 0:
            offset = part.start - 1
            file.seek(offset)
            offset += _skip_line(file, part.stop - part.start)
        while (is_whole or offset < part.stop) and (line := file.readline(limit)):
            location, is_first = f"{part.address} byte {offset}", offset == 0
            offset += len(line)
            if len(line) >= limit and not line.endswith(b"\n"):
                offset += _skip_line(file)
                if part.kind == "jsonl":
                    remedy = f"more than twice {text_format.max_document_bytes} bytes: take what is not text out of it"
                    rejected.add("line too long", location, f"it has {remedy}, or raise --max-document-bytes")
                    continue
            yield location, line.removeprefix(_mark(text_format)) if is_first else line


def _mark(text_format: TextFormat) -> bytes:
    """What may stand before the text of a file."""
    return codecs.BOM_UTF8 if text_format.is_utf_8 else b""


def length_remedy(text_format: TextFormat) -> str:
    """What to do about a document that is too long."""
    return f"it has more than {text_format.max_document_bytes} bytes (--max-document-bytes)"


def _skip_line(file: IO[bytes], limit: int | None = None) -> int:
    """Skip to the end of the line, or past `limit` bytes, in bounded steps; the bytes skipped."""
    skipped = 0
    while chunk := file.readline(1 << 20):
        skipped += len(chunk)
        if chunk.endswith(b"\n") or (limit is not None and skipped > limit):
            break
    return skipped


@contextmanager
def _at_most_one_fault(part: InputPart, rejected: RejectedDocuments) -> Iterator[None]:
    """Reject a file at its first fault, which ends the reading: what a stream gives after one may be anything in memory."""
    try:
        yield
    except UnicodeError as reason:
        rejected.add("another encoding", part.address, f"{reason}; give its own by --encoding")
    except READING_FAULTS as reason:
        counted, remedy = unreadable(part.address, "", reason)
        rejected.add(counted, part.address, remedy)


@contextmanager
def _opened(part: InputPart, text_format: TextFormat, rejected: RejectedDocuments) -> Iterator[IO[bytes] | None]:
    """A file at its beginning, as UTF-8; None and a rejection if it is nothing of the kind. Raises READING_FAULTS."""
    if part.compression and rejected.on_error == "skip":
        _read_through(part)
    with _stream(part) as file:
        head = file.peek(HEAD_BYTES)[:HEAD_BYTES]
        encoding = foreign_encoding(head) if text_format.is_utf_8 else _other_mark(head, text_format.encoding)
        fault, remedy = LFS_FAULT if storage.is_lfs_pointer(head) else ("", "")
        if encoding:
            named = "UTF-8" if text_format.is_utf_8 else text_format.encoding
            fault, remedy = f"not {named}", f"it is {encoding.upper()}: convert it, or give --encoding {encoding}"
        if fault and part.start == 0:  # once for a file
            rejected.add(fault, part.address, remedy)
        if fault:
            yield None
        elif text_format.is_utf_8:
            yield file
        else:
            yield io.BufferedReader(_Recoded(file, text_format.encoding), BUFFER_BYTES)


def _at_most(file: IO[bytes], limit: int) -> bytes:
    """What there is, up to `limit` bytes: reading them in one call would reserve memory for all of them."""
    content = bytearray()
    while len(content) < limit and (chunk := file.read(min(limit - len(content), BUFFER_BYTES))):
        content += chunk
    return bytes(content)


def _read_through(part: InputPart) -> None:
    """Raises READING_FAULTS for a damaged stream: what a flipped bit spoils looks like text until the checksum at the end."""
    with _stream(part) as file:
        while file.read(BUFFER_BYTES):
            pass


def _stream(part: InputPart) -> io.BufferedReader:
    system, path = storage.locate(part.address)
    with storage.named_errors(part.address):
        if part.compression:
            file = system.open_input_stream(path, compression=part.compression)
        else:
            file = system.open_input_file(path)
    return io.BufferedReader(file, BUFFER_BYTES)  # type: ignore[arg-type]


class _Recoded(io.RawIOBase):
    """A file of another encoding as UTF-8. Reading raises UnicodeError where the file is not in that encoding."""

    def __init__(self, file: IO[bytes], encoding: str) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._ready = memoryview(b"")
        self._is_first = True

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer; the number of bytes, 0 at the end."""
        chunk = b"more"
        while not self._ready and chunk:
            chunk = self._file.read(BUFFER_BYTES)
            text = self._decoder.decode(chunk, final=not chunk)
            self._ready = memoryview((text.removeprefix("\ufeff") if self._is_first else text).encode())
            self._is_first &= not text
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


def _unix(text: bytes) -> bytes:
    """Text with line ends of one byte."""
    return text.replace(b"\r\n", b"\n")


def _one_line(reason: Exception) -> str:
    return " ".join(str(reason).split())
