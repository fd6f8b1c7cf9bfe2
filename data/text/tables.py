"""Documents of tables: Parquet files, and Arrow files as Hugging Face's datasets write them."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq

from data import storage
from data.text.faults import READING_FAULTS, unreadable
from data.text.fields import column_fault, column_of
from data.text.formats import InputPart, RejectedDocuments

ROWS = 64
"""Documents in memory at once."""
ARROW_FILE = b"ARROW1"
"""An Arrow file begins with this, an Arrow stream does not."""
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


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
    except READING_FAULTS as reason:
        counted, remedy = unreadable(part.address, kind, reason)
        rejected.add(counted, part.address, remedy)


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
            yield stream.schema, 0, _batches(source, stream)


def _batches(source: pa.NativeFile, stream: pa.RecordBatchStreamReader) -> Iterator[pa.RecordBatch]:
    """The batches of a stream. Raises pyarrow.ArrowInvalid where it ends without its mark: it was cut between two of them."""
    while True:
        end = source.tell()
        try:
            batch = stream.read_next_batch()
        except StopIteration:
            break
        yield batch
    source.seek(end)
    mark = source.read(len(END_OF_STREAM))
    if mark != END_OF_STREAM and mark[:4] != bytes(4):  # Arrow before 0.15 wrote zeros alone
        raise pa.ArrowInvalid("it ends without the mark of its end, so rows may be missing")
