"""Options of the commands that read text: `tiglon tokenizer train` and `tiglon prepare`. See data/text/formats.py."""

from enum import StrEnum
from typing import Annotated

import typer

from data.text.formats import TextFormat


class TextDocumentsChoice(StrEnum):
    """What one document of a plain-text file is."""

    file = "file"
    line = "line"
    paragraph = "paragraph"


class OnErrorChoice(StrEnum):
    """What to do with a document that cannot be read: stop with an error, or leave it out and count it."""

    stop = "stop"
    skip = "skip"


def not_empty(value: str | list[str]) -> str | list[str]:
    """An argument that names files or a directory, as it is. Raises typer.BadParameter for "", as from an unset variable of a
    shell: it would be read as the working directory, or as the root."""
    if "" in ([value] if isinstance(value, str) else value):
        raise typer.BadParameter("it is empty, name a file or a directory")
    return value


InputsArgument = Annotated[
    list[str], typer.Argument(help="Files, folders, patterns or s3:// and gs:// addresses.", callback=not_empty)
]
FieldOption = Annotated[
    list[str] | None, typer.Option("--field", metavar="<name>", help="Field of the text (text), or FILES=NAME for some.")
]
TextDocumentsOption = Annotated[TextDocumentsChoice, typer.Option(metavar="<kind>", help="Document: file, line, paragraph.")]
OnErrorOption = Annotated[OnErrorChoice, typer.Option(metavar="<act>", help="Unreadable document: stop, skip.")]
MaxDocumentBytesOption = Annotated[int, typer.Option(help="Longest document (bytes).")]
EncodingOption = Annotated[str, typer.Option(help="Of text and JSON.")]


def text_format(
    field: list[str] | None,
    text_documents: TextDocumentsChoice,
    on_error: OnErrorChoice,
    max_document_bytes: int,
    encoding: str,
) -> TextFormat:
    """What the options say. Raises ValueError for a --field given twice, or a value that no text can be read by."""
    names = [value for value in field or [] if "=" not in value]
    if len(names) > 1:
        raise ValueError(f"--field is given as {' and as '.join(names)}: write FILES=NAME for the files where it is another")
    some = tuple((files, name) for files, mark, name in (value.rpartition("=") for value in field or []) if mark)
    form = TextFormat(names[0] if names else "text", text_documents.value, on_error.value, max_document_bytes, some, encoding)
    form.check()
    return form
