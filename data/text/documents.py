"""Read the documents of one part of a file: tables, JSON lines or plain text, local or in an object store.

Memory is bounded by the longest document allowed (`TextFormat.max_document_bytes`), not by the size of the file.
"""

from collections.abc import Iterator

from data.text.formats import InputPart, RejectedDocuments, TextFormat
from data.text.lines import encoding_remedy, json_rows, length_remedy, text_rows
from data.text.tables import table_rows


def read_documents(part: InputPart, text_format: TextFormat, rejected: RejectedDocuments) -> Iterator[str]:
    """The documents of a part, in order. Null, empty and unreadable ones are left out and counted in `rejected`.

    Raises ValueError for the first unreadable document if `on_error` is "stop", OSError for a store that does not respond.
    """
    match part.kind:
        case "parquet" | "arrow":
            values = table_rows(part, rejected)
        case "jsonl":
            values = json_rows(part, text_format, rejected)
        case "text":
            values = text_rows(part, text_format, rejected)
    for location, value in values:
        text = _valid_text(location, value, part, text_format, rejected)
        if text:
            yield text


def _valid_text(
    location: str, value: object, part: InputPart, text_format: TextFormat, rejected: RejectedDocuments
) -> str:  # fmt: skip
    """A document as text that is valid UTF-8 and not too long; "" when it is left out."""
    if value is None or value == "" or value == b"":
        rejected.counts["null" if value is None else "empty"] += 1
        return ""
    if not isinstance(value, str | bytes):
        rejected.add("not text", location, f"field '{part.field}' holds {type(value).__name__}")
        return ""
    if isinstance(value, bytes) and len(value) > text_format.max_document_bytes:  # it may be cut inside a character
        rejected.add("document too long", location, length_remedy(text_format))
        return ""
    try:
        data = value.encode() if isinstance(value, str) else value
        text = value if isinstance(value, str) else value.decode()
    except UnicodeEncodeError:  # half of a pair of JSON's \u escapes
        rejected.add("invalid UTF-8", location, "it holds half a surrogate pair: repair it where it was written")
        return ""
    except UnicodeDecodeError as reason:
        in_text = part.kind == "text"
        rejected.add("invalid UTF-8", location, encoding_remedy(reason) if in_text else "convert the text to UTF-8")
        return ""
    if len(data) > text_format.max_document_bytes:
        rejected.add("document too long", location, length_remedy(text_format))
        return ""
    return text
