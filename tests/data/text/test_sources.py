import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.ingest.prepare import prepare
from data.text.documents import read_documents
from data.text.formats import RejectedDocuments, TextFormat
from data.text.sources import check_fields, find_files, plan_tasks, refuse_inside


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


@pytest.mark.parametrize("spelled", ["s.txt", "./s.txt", "../in/s.txt", "~/s.txt", "../in", "link/../../in/s.txt", "*.txt"])
def test_a_file_is_the_same_however_it_is_spelled(tmp_path, monkeypatch, spelled):
    """In the addresses of a plan, for --field, and where it is given twice."""
    (tmp_path / "in").mkdir()
    (tmp_path / "far/deep").mkdir(parents=True)
    (tmp_path / "in/s.txt").write_text("one")
    (tmp_path / "in/link").symlink_to(tmp_path / "far/deep")
    monkeypatch.chdir(tmp_path / "in")
    monkeypatch.setenv("HOME", str(tmp_path / "in"))
    plain = plan_tasks([f"{tmp_path}/in/s.txt"], TextFormat())
    assert plan_tasks([spelled], TextFormat()) == plain
    with pytest.raises(ValueError, match="given twice"):
        plan_tasks(["s.txt", spelled], TextFormat())
    check_fields(find_files(["s.txt"]), TextFormat(fields=((spelled, "body"),)))
    for output in ("../in/out", "~/out", "link/../../in/out"):
        with pytest.raises(ValueError, match="lies in the input"):
            refuse_inside(output, ["../in"])


def test_a_link_to_a_file_keeps_its_name(tmp_path, monkeypatch):
    """Hugging Face's cache: the name has the ending, and what it points to has none."""
    for folder in ("blobs", "snapshots/1"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "blobs/0f").write_text('{"text": "a"}\n')
    (tmp_path / "snapshots/1/a.jsonl").symlink_to("../../blobs/0f")
    monkeypatch.chdir(tmp_path / "blobs")
    ((part,),) = plan_tasks(["../snapshots/1"], TextFormat())
    assert part.address == f"{tmp_path}/snapshots/1/a.jsonl" and part.kind == "jsonl"


@pytest.mark.parametrize("inputs", [[""], ["x.jsonl", ""]])
def test_an_empty_input_is_not_the_working_directory(tmp_path, monkeypatch, inputs):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match="an address is empty"):
        plan_tasks(inputs, TextFormat())


@pytest.mark.parametrize("name", ["x.jsonl", "x.txt", "x.parquet"])
@pytest.mark.parametrize("size", [0, -1, -(10**30)])
def test_a_task_of_no_bytes_is_refused(tmp_path, name, size):
    (tmp_path / name).write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match=f"task_bytes = {size}: give at least 1 byte"):
        plan_tasks([str(tmp_path / name)], TextFormat(), size)


def test_a_task_may_be_larger_than_any_input(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n')
    assert len(plan_tasks([str(tmp_path)], TextFormat(), 10**30)) == 1


def test_a_file_behind_a_link_to_its_folder_is_told_by_both_names(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/loop").symlink_to(tmp_path)
    with pytest.raises(ValueError, match=r"a\.txt' is given twice, also as '.*sub/loop/a\.txt'"):
        plan_tasks([str(tmp_path / "a.txt"), str(tmp_path / "sub/loop/a.txt")], TextFormat())
