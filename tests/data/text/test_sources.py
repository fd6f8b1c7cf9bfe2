import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.ingest.prepare import prepare
from data.text.documents import read_documents
from data.text.formats import RejectedDocuments, TextFormat
from data.text.sources import BROKEN_LINK, SECOND_LINK, check_fields, find_files, plan_tasks, refuse_inside


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


def test_a_file_given_by_two_addresses_is_given_twice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").symlink_to("a.txt")
    for other in (f"file://{tmp_path}/a.txt", f"file://{tmp_path}/*.txt", "b.txt", f"{tmp_path}", "./a.txt"):
        with pytest.raises(ValueError, match=r"'.*a\.txt' is given twice"):
            find_files(["a.txt", other])


@pytest.mark.parametrize("inputs", [["."], ["*"], ["**"], ["file://{}"]])
def test_of_links_to_one_file_one_is_read(tmp_path, monkeypatch, inputs):
    """Whatever their order; the first of two links to a file outside, which are all that there is of it."""
    folder, outside = tmp_path / "text", tmp_path / "outside"
    for name in (folder / "data/m.txt", folder / "far/n.txt", outside / "o.txt", outside / "p/q.txt"):
        name.parent.mkdir(parents=True, exist_ok=True)
        name.write_text(name.name)
    links = {"a.txt": "data/m.txt", "z.txt": "far/n.txt", "c.txt": "../outside/o.txt", "d.txt": "c.txt", "e": "data",
             "p": "../outside/p", "gone.txt": "nowhere"}  # fmt: skip
    for name, target in links.items():
        (folder / name).symlink_to(target)
    monkeypatch.chdir(folder)
    inputs = [address.format(folder) for address in inputs]
    found = find_files(inputs)
    names = sorted(path.removeprefix("file://").removeprefix(f"{folder}/") for path, _ in found.files)
    gone = {
        reason: sorted(os.path.relpath(path.removeprefix("file://")) for path in paths)
        for reason, paths in found.left_out.items()
    }
    if inputs == ["*"]:  # these links are all that it meets, but for the two to one file
        assert names == ["a.txt", "c.txt", "z.txt"] and gone == {BROKEN_LINK: ["gone.txt"], SECOND_LINK: ["d.txt"]}
    else:
        assert names == ["c.txt", "data/m.txt", "far/n.txt", "p/q.txt"]
        assert gone == {BROKEN_LINK: ["gone.txt"], SECOND_LINK: ["a.txt", "d.txt", "e/m.txt", "z.txt"]}
    assert f"{SECOND_LINK}: " in "".join(found.remarks()) and f"left out 1 file, {BROKEN_LINK}: gone.txt" in found.remarks()


def test_a_cache_made_of_links_is_read(tmp_path):
    """As Hugging Face keeps downloads: names that lead to blobs, two of them to the same where files are equal."""
    snapshot, blobs = tmp_path / "snapshots/0123", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number in (0, 1):
        pq.write_table(pa.table({"text": [f"{number}"]}), blobs / f"blob{number}")
        (snapshot / f"{number}.parquet").symlink_to(f"../../blobs/blob{number}")
    for folder in (snapshot, tmp_path):
        assert [path for path, _ in find_files([str(folder)]).files] == [f"{snapshot}/{number}.parquet" for number in (0, 1)]
    assert len(find_files([str(snapshot), f"{snapshot}/*.parquet"]).files) == 2
    (tmp_path / "snapshots/4567").symlink_to("0123")
    found = find_files([str(tmp_path)])
    assert len(found.files) == 2 and len(found.left_out[SECOND_LINK]) == 2


def test_a_folder_of_links_that_lead_nowhere_holds_nothing(tmp_path):
    (tmp_path / "x.txt").symlink_to("nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds no text and no data, but x\.txt \(broken link\)"):
        find_files([str(tmp_path)])
    with pytest.raises(FileNotFoundError, match="no files at"):
        find_files([str(tmp_path / "x.txt")])
