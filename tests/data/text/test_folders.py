import pytest

from data.text.folders import BESIDE_DATA, CACHE, NOT_TEXT, choose_files, splits_in


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
        (["/x/data-00000-of-00001.arrow", "/x/cache-0a1b2c3d4e5f6789.arrow"], {CACHE: ["/x/cache-0a1b2c3d4e5f6789.arrow"]}),
        (
            ["/x/j-train.arrow", "/x/cache-0123456789abcdef_00001_of_00004.arrow"],
            {CACHE: ["/x/cache-0123456789abcdef_00001_of_00004.arrow"]},
        ),
        (["/x/cache-0123456789abcdef.arrow", "/x/cache-1123456789abcdef.arrow"], {}),  # all that is there
        (
            [
                "/x/data.arrow",
                "/x/y/cache-0123456789abcdef.arrow",
                "/x/cache-of-pages.arrow",
                "/x/cache-0123456789abcdef.jsonl",
            ],
            {},
        ),
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
        (["/x/train.jsonl", "/x/validate.jsonl", "/x/latest.jsonl", "/x/evaluated.jsonl", "/x/device.jsonl"], {}),
        (["/x/train-00000-of-00001-a09b74b3ef9c3b56.parquet", "/x/test-00000-of-00001-b42a775f407cee45.parquet"],
         {"train": "train*", "test": "test*"}),
        (["/x/c4-train.00000-of-01024.json", "/x/c4-validation.00000-of-00008.json"],
         {"train": "c4-train*", "validation": "c4-validation*"}),
        (["/x/0.0.0/json-test.arrow", "/x/0.0.0/json-train.arrow"], {"test": "0.0.0/json-test*", "train": "0.0.0/json-train*"}),
        (["/x/train_000.jsonl.zst", "/x/valid_000.jsonl.zst"], {"train": "train*", "valid": "valid*"}),
        (["/x/train-0001.jsonl", "/x/test-0001.jsonl"], {"train": "train*", "test": "test*"}),
        (["/x/en.train.jsonl", "/x/en.test.jsonl"], {"train": "en.train*", "test": "en.test*"}),
        (["/x/My Train.jsonl", "/x/My Test.jsonl"], {"train": "My Train*", "test": "My Test*"}),
        (["/x/Train/x.jsonl", "/x/Test/x.jsonl"], {"train": "Train", "test": "Test"}),
        (["/x/training/x.jsonl", "/x/testing/x.jsonl"], {"training": "training", "testing": "testing"}),
        (["/x/TRAIN/x.jsonl", "/x/held-out/x.jsonl"], {"train": "TRAIN", "held-out": "held-out"}),
        (["/x/train/x.jsonl", "/x/heldout/x.jsonl"], {"train": "train", "heldout": "heldout"}),
        (["/x/train.jsonl", "/x/train_holdout_2.jsonl.gz"], {"train": "train*", "holdout": "train_holdout*"}),
        (["/x/train.jsonl", "/x/web_held_out_2.jsonl.gz"], {"train": "train*", "held_out": "web_held_out*"}),
        (["/x/train/x.jsonl", "/x/hold_out/x.jsonl"], {"train": "train", "hold_out": "hold_out"}),
        # plain text
        (["/x/train/a.txt", "/x/test/b.txt"], {"train": "train", "test": "test"}),
        (["/x/train.txt", "/x/Valid.txt"], {"train": "train*", "valid": "Valid*"}),
        (["/x/ptb.train.txt", "/x/ptb.valid.txt.gz"], {"train": "ptb.train*", "valid": "ptb.valid*"}),
        (["/x/train.txt", "/x/test_driven.txt"], {}),
        (["/x/train-times.txt", "/x/test-results.md"], {}),
        (["/x/train.py", "/x/tests/test_a.py", "/x/README.md"], {}),
        (["/x/train/a.py", "/x/eval/b.py.gz", "/x/test.py"], {}),
        (["/x/train.md", "/x/tests/a.rst", "/x/latest/b.txt"], {}),
    ],
)  # fmt: skip
def test_training_and_held_out_data_are_told_apart(paths, splits):
    assert splits_in(paths, "/x") == splits


def test_the_folder_that_is_given_is_no_split():
    assert splits_in(["/test/a.jsonl", "/test/train.jsonl"], "/test") == {}
