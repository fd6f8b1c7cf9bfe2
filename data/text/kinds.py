"""What kind of file a name says that it is."""

from data.text.formats import FileKind

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
ENDINGS: dict[str, FileKind] = {
    ".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow",
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl",
    ".txt": "text", ".md": "text", ".rst": "text", ".py": "text",
}  # fmt: skip
TABLES = ("parquet", "arrow")


def kind_of(address: str) -> tuple[FileKind, str | None] | None:
    """(kind, compression as pyarrow names it) of a file; None where its name says neither text nor data."""
    name = (address.partition("?")[0] if "://" in address else address).lower()
    compression = next((value for ending, value in COMPRESSIONS.items() if name.endswith(ending)), None)
    if compression:
        name = name.rsplit(".", 1)[0]
    for ending, kind in ENDINGS.items():
        if name.endswith(ending) and not (compression and kind in TABLES):
            return kind, compression
    return None
