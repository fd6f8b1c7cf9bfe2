"""Which files of a folder are documents: its data, and not what describes them or what software left beside them."""

import os
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
CACHED = re.compile(r"(?<![^/])cache-[0-9a-f]{8,}(_\d+_of_\d+)?\.arrow\Z")
"""What datasets keeps of a map or a sort beside the rows that it was made of."""
BESIDE_DATA, NOT_TEXT, CACHE = "text beside data", "neither text nor data", "cache of Hugging Face's datasets"
TRAINING_SPLITS = ("train", "training")
HELD_OUT_SPLITS = ("test", "testing", "validation", "valid", "val", "dev", "eval", "held-out", "hold-out")
"""Words for the splits of a dataset; instead of the hyphen there may be another separator, or none."""
SPLIT = "|".join((*TRAINING_SPLITS, *HELD_OUT_SPLITS)).replace("-", "[-_. ]?")
IN_NAME, IN_STEM, FOLDER = (
    re.compile(pattern, re.IGNORECASE)
    for pattern in (rf"(?<![^-_. ])({SPLIT})(?![^-_. ])", rf"(?<![^.])({SPLIT})(?=\.)", rf"({SPLIT})\Z")
)
"""A word as a part of the name of a file of data, as a part between dots of one of plain text, as the name of a folder."""
SOURCE_CODE = re.compile(r"\.py(\.|\Z)", re.IGNORECASE)


def choose_files(paths: list[str]) -> tuple[list[str], dict[str, list[str]]]:
    """(files that are read, files that are left out by reason) of those found in a folder.

    Plain text is left out where there are tables or JSON lines in its directory or below: README.md and LICENSE.txt describe
    them. So is what datasets cached of the rows beside it. Files of unknown endings stay, for the one who reads them to refuse.
    """
    left_out: dict[str, list[str]] = {}
    kept = []
    data = {path for path in paths if _is_data(path)}
    with_rows = {os.path.dirname(path) for path in data if path.endswith(".arrow") and not CACHED.search(path)}
    with_data = {os.path.dirname(path) for path in data}
    with_data |= {str(parent) for folder in with_data for parent in PurePosixPath(folder).parents}
    for path in paths:
        folder, name = os.path.split(path)
        is_known = path in data or kind_of(path) is not None
        if name in DATASET_FILES or (not is_known and PurePosixPath(name).suffix.lower() in NO_DOCUMENTS):
            left_out.setdefault(NOT_TEXT, []).append(path)
        elif is_known and path not in data and folder in with_data:
            left_out.setdefault(BESIDE_DATA, []).append(path)
        elif CACHED.search(path) and folder in with_rows:
            left_out.setdefault(CACHE, []).append(path)
        else:
            kept.append(path)
    return kept, left_out


def splits_in(paths: list[str], folder: str) -> dict[str, str]:
    """The splits of a dataset, each with what names its files, when a folder holds training data and held-out data; else none.

    A file belongs to a split by its name (train.jsonl, c4-train.00000-of-01024.json) or by its directory (train/0.parquet). For
    plain text the word is all of the name or stands between dots, and source code belongs to none.
    """
    found: dict[str, str] = {}
    for path in paths:
        split, files = _split_of(path[len(folder) :].strip("/"))
        if split:
            found.setdefault(split, files)
    return found if found.keys() & {*TRAINING_SPLITS} and found.keys() - {*TRAINING_SPLITS} else {}


def _is_data(path: str) -> bool:
    kind = kind_of(path)
    return kind is not None and kind[0] != "text" and os.path.basename(path) not in DATASET_FILES


def _split_of(path: str) -> tuple[str, str]:
    """The split that a file below a folder belongs to and what names it and its like there; empty for none."""
    *directories, file = path.split("/")
    if kind_of(path) is None or SOURCE_CODE.search(file):
        return "", ""
    if words := [*(IN_NAME if _is_data(path) else IN_STEM).finditer(file)]:
        return words[-1][1].lower(), "/".join([*directories, f"{file[: words[-1].end(1)]}*"])
    named = [depth for depth, name in enumerate(directories) if FOLDER.match(name)][-1:]
    return next(((directories[depth].lower(), "/".join(directories[: depth + 1])) for depth in named), ("", ""))
