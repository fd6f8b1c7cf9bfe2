import pytest

from data.text.folders import BESIDE_DATA, NOT_TEXT, choose_files, splits_in


@pytest.mark.parametrize(
    ("paths", "left_out"),
    [
        (["/x/a.txt", "/x/README.md"], {}),
        (["/x/a.jsonl", "/x/README.md", "/x/notes.txt.gz"], {BESIDE_DATA: ["/x/README.md", "/x/notes.txt.gz"]}),
        (["/x/data/a.parquet", "/x/README.md", "/x/more/b.txt"], {BESIDE_DATA: ["/x/README.md"]}),
        (["/x/data/a.parquet", "/x/data/more/b.txt"], {}),
        (["/x/state.json", "/x/a.txt"], {NOT_TEXT: ["/x/state.json"]}),
        (["/x/state.json", "/x/dataset_info.json", "/x/a.arrow"], {NOT_TEXT: ["/x/state.json", "/x/dataset_info.json"]}),
        (["/x/LICENSE", "/x/a.txt", "/x/a.PNG"], {NOT_TEXT: ["/x/LICENSE", "/x/a.PNG"]}),
        (["/x/a.jsonl", "/x/a.csv", "/x/b.xz"], {}),
    ],
)
def test_what_is_left_out(paths, left_out):
    kept, found = choose_files(paths)
    assert found == left_out
    assert kept == [path for path in paths if not any(path in gone for gone in left_out.values())]


@pytest.mark.parametrize(
    ("paths", "splits"),
    [
        (["/x/train.jsonl", "/x/test.jsonl"], {"train": "train*", "test": "test*"}),
        (["/x/train-00000-of-00002.parquet", "/x/val-00000-of-00001.parquet"], {"train": "train*", "val": "val*"}),
        (["/x/en/train/0.arrow", "/x/en/dev/0.arrow"], {"train": "en/train", "dev": "en/dev"}),
        (["/x/train.jsonl.gz", "/x/eval.jsonl.gz"], {"train": "train*", "eval": "eval*"}),
        (["/x/train.jsonl"], {}),
        (["/x/test.jsonl", "/x/validation.jsonl"], {}),
        (["/x/train.py", "/x/test.py"], {}),  # source code, not a dataset
        (["/x/books-00000-of-00001.parquet", "/x/web-00000-of-00001.parquet"], {}),
        (["/x/training.jsonl", "/x/tests.jsonl"], {}),
        (["/x/train.jsonl", "/x/contest.jsonl"], {}),
    ],
)
def test_training_and_held_out_data_are_told_apart(paths, splits):
    assert splits_in(paths, "/x") == splits


def test_the_folder_that_is_given_is_no_split():
    assert splits_in(["/test/a.jsonl", "/test/train.jsonl"], "/test") == {}
