"""How text is read: the options of the commands that read it, the parts that files are cut into, and what is left out."""

import codecs
import io
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from typing import Any, Literal

from data.storage import absolute_path

LONGEST_DOCUMENT = 1 << 40
"""Bytes; twice as many are an offset that every library can still take."""
OnError = Literal["stop", "skip"]
TextDocuments = Literal["file", "line", "paragraph"]
FileKind = Literal["parquet", "arrow", "jsonl", "text"]


@dataclass(frozen=True)
class TextFormat:
    """Where the documents are in a file, and what happens to those that cannot be read."""

    field: str = "text"  # column of a table or field of a JSON object; a dot leads into an object: content.body
    text_documents: TextDocuments = "file"  # what a document of a plain-text file is
    on_error: OnError = "stop"  # "skip" leaves out and counts what cannot be read
    max_document_bytes: int = 64 << 20  # of UTF-8; a longer document cannot be read
    fields: tuple[tuple[str, str], ...] = ()  # (files, field): the field of these files, where it is another
    encoding: str = "utf-8"  # of plain text and JSON lines, as Python names it

    def check(self) -> None:
        """Raises ValueError for values that no text can be read by."""
        try:
            io.TextIOWrapper(io.BytesIO(), encoding=self.encoding).read()
        except (LookupError, UnicodeError, ValueError):
            raise ValueError(
                f"--encoding {self.encoding!a} names no encoding of text: give one such as utf-16, latin-1 or cp1252"
            ) from None
        if not 1 <= self.max_document_bytes <= LONGEST_DOCUMENT:
            raise ValueError(
                f"--max-document-bytes {self.max_document_bytes}: give at least 1 byte, at most {LONGEST_DOCUMENT}"
            )
        for name in (self.field, *(name for _, name in self.fields)):
            if not name:
                raise ValueError("--field is empty: name the column or field that holds the text")
        for files, name in self.fields:
            if not files:
                raise ValueError(f"--field '={name}' is for no file: write FILES={name}, or {name} for all of them")

    @property
    def is_utf_8(self) -> bool:
        """Whether plain text and JSON lines are read as they are."""
        return codecs.lookup(self.encoding).name in ("utf-8", "utf-8-sig")

    def field_of(self, address: str) -> str:
        """The field of a file."""
        rule = self.field_rule(address)
        return rule[1] if rule else self.field

    def field_rule(self, address: str) -> tuple[str, str] | None:
        """The first of `fields` that means a file; None if none does."""
        return next((rule for rule in self.fields if means(rule[0], address)), None)

    def record(self) -> dict[str, Any]:
        """What decides which documents are read, for a plan; without options of later versions that are not used."""
        values = asdict(self) | {"fields": tuple((_spelled(files), name) for files, name in self.fields)}
        unused = {"fields": (), "encoding": "utf-8"}
        return {key: value for key, value in values.items() if key not in unused or value != unused[key]}


def _spelled(files: str) -> str:
    """The one spelling of the files of a --field; a name alone stays a pattern of names."""
    return absolute_path(files) if "/" in files and "://" not in files else files.rstrip("/")


def means(files: str, address: str) -> bool:
    """Whether `files` on the command line means the file at an address: that file, a folder of it, a pattern of its address
    or, without a slash, of its name."""
    path = address.partition("?")[0] if "://" in address else address
    if "/" not in files and fnmatch(path.rpartition("/")[2], files):
        return True
    wanted = files.rstrip("/") if "://" in files else absolute_path(files)
    patterns = wanted, wanted.replace("/**/", "/")  # which stands for no folder too
    return path == wanted or path.startswith(wanted + "/") or any(fnmatch(path, pattern) for pattern in patterns)


@dataclass(frozen=True)
class InputPart:
    """Part of a file: lines that begin in bytes [start, stop) of a text file, row groups [start, stop) of a Parquet file, or
    the whole of an Arrow file."""

    address: str
    kind: FileKind
    compression: str | None  # as pyarrow names it
    start: int
    stop: int
    bytes: int  # of input, for the size of tasks and for progress
    field: str  # that holds the text


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


def left_out_remark(counts: Mapping[str, int]) -> str:
    """A sentence about the documents left out, by reason; "" if there are none."""
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(counts.items()) if count)
    return f"documents left out: {reasons}" if reasons else ""
