import struct

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.text.formats import InputPart, RejectedDocuments
from data.text.tables import table_rows


def part(path, kind, start=0, stop=1):
    return InputPart(str(path), kind, None, start, stop, 1, "text")


def test_rows_are_numbered_as_in_the_file(tmp_path):
    """Row groups of 100 rows, a batch of 64 in memory: row 250 is one of the third group's second batch."""
    texts = [f"{number}" for number in range(300)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "x.parquet", row_group_size=100)
    found = list(table_rows(part(tmp_path / "x.parquet", "parquet", 2, 3), RejectedDocuments()))
    assert found == [(f"{tmp_path}/x.parquet row {number}", texts[number].encode()) for number in range(200, 300)]


@pytest.mark.parametrize("new", [pa.ipc.new_file, pa.ipc.new_stream])
@pytest.mark.parametrize("compression", [None, "zstd"])
def test_files_and_streams_of_arrow(tmp_path, new, compression):
    whole = pa.table({"n": range(300), "text": [f"{number}" for number in range(300)]})
    with new(str(tmp_path / "x.arrow"), whole.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(whole, max_chunksize=70)
    found = list(table_rows(part(tmp_path / "x.arrow", "arrow"), RejectedDocuments()))
    assert found == [(f"{tmp_path}/x.arrow row {number}", f"{number}".encode()) for number in range(300)]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_rubbish_is_counted_once(tmp_path, kind):
    (tmp_path / "x").write_bytes(b"ARROW1\0\0" + bytes(range(256)) * 20)
    rejected = RejectedDocuments("skip")
    assert list(table_rows(part(tmp_path / "x", kind), rejected)) == []
    assert sum(rejected.counts.values()) == 1
    with pytest.raises(ValueError, match="that can be read") as told:
        list(table_rows(part(tmp_path / "x", kind), RejectedDocuments()))
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("new", [pa.ipc.new_file, pa.ipc.new_stream])
@pytest.mark.parametrize("lead", [3, 1 << 27, -1])
def test_offsets_that_lead_elsewhere_are_refused(tmp_path, new, lead):
    """A file may be a stranger's: reading beyond a buffer would be a crash, or another's memory."""
    whole = pa.table({"text": ["ab", "cd"]})
    with new(str(tmp_path / "x.arrow"), whole.schema) as writer:
        writer.write_table(whole)
    content, offsets = (tmp_path / "x.arrow").read_bytes(), struct.pack("<3i", 0, 2, 4)
    assert content.count(offsets) == 1
    (tmp_path / "x.arrow").write_bytes(content.replace(offsets, struct.pack("<3i", 0, lead, 4 if lead < 4 else lead)))
    if lead == 3:  # another cut, and no damage
        assert [value for _, value in table_rows(part(tmp_path / "x.arrow", "arrow"), RejectedDocuments())] == [b"abc", b"d"]
    else:
        with pytest.raises(ValueError, match="unreadable Arrow"):
            list(table_rows(part(tmp_path / "x.arrow", "arrow"), RejectedDocuments()))


@pytest.mark.parametrize("batches", [1, 2, 3])
@pytest.mark.parametrize("dictionary", [False, True])
def test_a_stream_cut_between_batches_is_unreadable(tmp_path, batches, dictionary):
    """It reads without an error, and rows are missing."""
    text = pa.array([f"row {number}" for number in range(30)])
    whole, sizes = pa.table({"text": text.dictionary_encode() if dictionary else text}), []
    with open(tmp_path / "x.arrow", "wb") as file, pa.ipc.new_stream(file, whole.schema) as writer:
        for batch in whole.to_batches(max_chunksize=10):
            sizes.append(file.tell())
            writer.write_batch(batch)
        sizes.append(file.tell())
    content = (tmp_path / "x.arrow").read_bytes()
    assert len(content) == sizes[3] + 8
    (tmp_path / "x.arrow").write_bytes(content[: sizes[batches]])
    rejected = RejectedDocuments("skip")
    rows = [value for _, value in table_rows(part(tmp_path / "x.arrow", "arrow"), rejected)]
    assert rows == [b"row %d" % number for number in range(10 * batches)] and rejected.counts == {"unreadable Arrow": 1}
    with pytest.raises(ValueError, match=r"x\.arrow: unreadable Arrow; .*rows may be missing"):
        list(table_rows(part(tmp_path / "x.arrow", "arrow"), RejectedDocuments()))
    (tmp_path / "x.arrow").write_bytes(content[: sizes[3]] + bytes(4))  # as Arrow before 0.15 ended a stream
    assert len(list(table_rows(part(tmp_path / "x.arrow", "arrow"), RejectedDocuments()))) == 30
