"""Options of the commands that read text: `tiglon tokenizer train` and `tiglon prepare`. See data/text/formats.py."""

from enum import StrEnum
from typing import Annotated

import typer


class TextDocumentsChoice(StrEnum):
    """What one document of a plain-text file is."""

    file = "file"
    line = "line"
    paragraph = "paragraph"


class OnErrorChoice(StrEnum):
    """What to do with a document that cannot be read: stop with an error, or leave it out and count it."""

    stop = "stop"
    skip = "skip"


InputsArgument = Annotated[list[str], typer.Argument(help="Files, folders, patterns or s3:// and gs:// addresses.")]
FieldOption = Annotated[str, typer.Option("--field", help="Parquet column or JSON field that holds the text.")]
TextDocumentsOption = Annotated[TextDocumentsChoice, typer.Option(metavar="<kind>", help="Document: file, line, paragraph.")]
OnErrorOption = Annotated[OnErrorChoice, typer.Option(metavar="<act>", help="Unreadable document: stop, skip.")]
MaxDocumentBytesOption = Annotated[int, typer.Option(help="Longest document (bytes).")]
