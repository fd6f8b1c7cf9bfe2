import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.ingest.prepare import prepare
from data.text.documents import read_documents
from data.text.formats import RejectedDocuments, TextFormat
from data.text.sources import plan_tasks


def test_no_documents_no_corpus(tmp_path, tokenizer_directory):
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="no document to prepare"):
        prepare([str(tmp_path / "x.parquet")], tokenizer_directory, str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (["nowhere"], "no files at"),
        (["x.jsonl", "x.jsonl"], "given twice"),
        (["x.jsonl", "*.jsonl"], "given twice"),
        (["x.csv"], "known kind"),
        (["none-*.txt"], "no files at"),
        (["ftp://host/x"], "cannot open the address"),
    ],
)
def test_wrong_inputs_are_told_in_one_sentence(tmp_path, monkeypatch, inputs, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "x.csv").write_text("a")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        plan_tasks(inputs, TextFormat())


def test_tasks_tile_the_input(tmp_path):
    """Whatever the task size, every line is read once and in order."""
    lines = [f"line {number} " + "x" * (number % 37) for number in range(500)]
    (tmp_path / "x.txt").write_text("\n".join(lines))
    reading = TextFormat(text_documents="line")
    for size in (1, 7, 64, 1000, 10**6):
        faults = RejectedDocuments()
        tasks = plan_tasks([str(tmp_path / "x.txt")], reading, size)
        assert [text for task in tasks for piece in task for text in read_documents(piece, reading, faults)] == lines
