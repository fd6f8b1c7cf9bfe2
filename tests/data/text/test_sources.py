import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.ingest.prepare import prepare
from data.text.documents import read_documents
from data.text.formats import RejectedDocuments, TextFormat
from data.text.sources import plan_tasks, refuse_inside


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


@pytest.mark.parametrize(
    ("output", "inputs", "refused"),
    [
        ("text/out", ["text"], True),
        ("text", ["text/"], True),
        ("text/a/../../text/out", ["other", "./text"], True),
        ("out", ["text"], False),
        ("text-out", ["text"], False),
        ("text/out", ["text/*.txt"], False),
        ("text/out", ["text/a.txt"], False),
        ("text/out", ["s3://bucket/text"], False),
    ],
)
def test_an_output_in_the_input_is_refused(tmp_path, monkeypatch, output, inputs, refused):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").write_text("one")
    if refused:
        with pytest.raises(ValueError, match=r"lies in the input .* choose another"):
            refuse_inside(output, inputs)
    else:
        refuse_inside(output, inputs)


def test_a_file_behind_a_link_to_its_folder_is_told_by_both_names(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/loop").symlink_to(tmp_path)
    with pytest.raises(ValueError, match=r"a\.txt' is given twice, also as '.*sub/loop/a\.txt'"):
        plan_tasks([str(tmp_path / "a.txt"), str(tmp_path / "sub/loop/a.txt")], TextFormat())
