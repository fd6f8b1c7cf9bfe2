"""Which files of a folder are documents: its data, and not what describes them or what software left beside them."""

import re
from pathlib import PurePosixPath

from data.text.kinds import kind_of

DATASET_FILES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""What Hugging Face's datasets writes beside the data."""
NO_DOCUMENTS = (
    "", ".cfg", ".crc", ".css", ".gif", ".ico", ".ini", ".jpeg", ".jpg", ".lock", ".md5", ".png", ".sh", ".sha1", ".sha256",
    ".svg", ".toml", ".yaml", ".yml",
)  # fmt: skip
"""Endings of files that stand beside text and data and are neither."""
BESIDE_DATA, NOT_TEXT = "text beside data", "neither text nor data"
TRAIN, HELD_OUT = ("train",), ("test", "validation", "valid", "val", "dev", "eval")


def choose_files(paths: list[str]) -> tuple[list[str], dict[str, list[str]]]:
    """(files that are read, files that are left out by reason) of those found in a folder.

    Plain text is left out where there are tables or JSON lines in its directory or below: README.md and LICENSE.txt describe
    them. Files of unknown endings stay, for the one who reads them to refuse.
    """
    left_out: dict[str, list[str]] = {}
    kept = []
    data = [path for path in paths if _is_data(path)]
    with_data = {parent for path in data for parent in PurePosixPath(path).parents}
    for path in paths:
        name = PurePosixPath(path)
        if name.name in DATASET_FILES or (name.suffix.lower() in NO_DOCUMENTS and kind_of(path) is None):
            left_out.setdefault(NOT_TEXT, []).append(path)
        elif not _is_data(path) and kind_of(path) is not None and name.parent in with_data:
            left_out.setdefault(BESIDE_DATA, []).append(path)
        else:
            kept.append(path)
    return kept, left_out


def splits_in(paths: list[str], folder: str) -> dict[str, str]:
    """The splits of a dataset, each with what names its files, when a folder holds training data and held-out data; else none.

    A file belongs to a split by its name (train.jsonl, train-00000-of-00002.parquet) or by its directory (train/0.parquet).
    """
    found: dict[str, str] = {}
    for path in paths:
        if _is_data(path):
            for split, files in _split_of(path[len(folder) :].strip("/")):
                found.setdefault(split, files)
    return found if found.keys() & set(TRAIN) and found.keys() & set(HELD_OUT) else {}


def _is_data(path: str) -> bool:
    kind = kind_of(path)
    return kind is not None and kind[0] != "text" and PurePosixPath(path).name not in DATASET_FILES


def _split_of(path: str) -> list[tuple[str, str]]:
    """The split that a file below a folder belongs to and what names it and its like there; [] for none."""
    *directories, file = path.split("/")
    stem = re.sub(r"-\d+-of-\d+$", "", file.partition(".")[0])
    if stem in TRAIN + HELD_OUT:
        return [(stem, "/".join([*directories, f"{stem}*"]))]
    named = [depth for depth, name in enumerate(directories) if name in TRAIN + HELD_OUT][-1:]
    return [(directories[depth], "/".join(directories[: depth + 1])) for depth in named]
