"""Documents of tables: Parquet files, and Arrow files as Hugging Face's datasets write them."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

import pyarrow as pa
import pyarrow.parquet as pq

from data import storage
from data.text.fields import column_fault, column_of
from data.text.formats import InputPart, RejectedDocuments

ROWS = 64
"""Documents in memory at once."""
ARROW_FILE = b"ARROW1"
"""An Arrow file begins with this, an Arrow stream does not."""


def open_parquet(address: str) -> pq.ParquetFile:
    """Open a Parquet file. Raises OSError or pyarrow.ArrowException, which do not always say which file."""
    system, path = storage.locate(address)
    return pq.ParquetFile(system.open_input_file(path), pre_buffer=False, buffer_size=1 << 20)


def table_rows(part: InputPart, rejected: RejectedDocuments) -> Iterator[tuple[str, object]]:
    """(location, value) of the rows of a part, in order; values are bytes, or None for null."""
    kind, opened = ("Parquet", _parquet) if part.kind == "parquet" else ("Arrow", _arrow)
    try:
        with opened(part) as (schema, first_row, batches):
            if fault := column_fault(schema, part.field):
                rejected.add("no text column", part.address, f"{fault}; choose with --field")
                return
            for batch in batches:
                column = column_of(batch, part.field)
                for start in range(0, len(column), ROWS):
                    for row, value in enumerate(column[start : start + ROWS].to_pylist(), first_row + start):
                        yield f"{part.address} row {row}", value
                first_row += len(column)
    except (pa.ArrowException, OSError) as reason:
        storage.raise_outage(part.address, reason)
        rejected.add(f"unreadable {kind}", part.address, unreadable(part.address, kind, reason))


def unreadable(address: str, kind: str, reason: Exception) -> str:
    """What is wrong with a file, in words."""
    system, path = storage.locate(address)
    with suppress(pa.ArrowException, OSError), system.open_input_file(path) as file:
        head = file.read(256)
        if storage.is_lfs_pointer(head):
            return "it is a Git LFS pointer, not the file itself: run git lfs pull in its repository"
        if not head:
            return "it is empty: copy it again"
    return f"it is no {kind} file that can be read ({' '.join(str(reason).split())}): copy or write it again"


Table = tuple[pa.Schema, int, Iterable[pa.RecordBatch]]
"""Schema, number of the first row, batches."""


@contextmanager
def _parquet(part: InputPart) -> Iterator[Table]:
    with open_parquet(part.address) as file:
        schema, groups = file.schema_arrow, range(part.start, part.stop)
        first_row = sum(file.metadata.row_group(group).num_rows for group in range(part.start))
        batches = file.iter_batches(ROWS, [*groups], [part.field], use_threads=False)
        yield schema, first_row, batches


@contextmanager
def _arrow(part: InputPart) -> Iterator[Table]:
    """An Arrow file or stream; a local one is mapped, not read as a whole."""
    system, path = storage.locate(part.address)
    with system.open_input_file(path) if storage.is_remote(part.address) else pa.memory_map(path) as source:
        head = source.read(len(ARROW_FILE))
        source.seek(0)
        if head == ARROW_FILE:
            file = pa.ipc.open_file(source)
            yield file.schema, 0, (file.get_batch(index) for index in range(file.num_record_batches))
        else:
            stream = pa.ipc.open_stream(source)
            yield stream.schema, 0, stream
