"""What is wrong with a file that cannot be read."""

import os
from contextlib import suppress

import pyarrow as pa

from data import storage

LFS_FAULT = "Git LFS pointer", "it is not the file itself: run git lfs pull in its repository"
READING_FAULTS = (OSError, EOFError, pa.ArrowException)
"""What reading a file raises where the file, the disk or the store is at fault."""


def unreadable(address: str, kind: str, reason: Exception) -> tuple[str, str]:
    """(what a file is counted as, what is wrong with it and what to do), after one of READING_FAULTS.

    Args:
        kind: "Parquet" or "Arrow"; "" for text.

    Raises:
        OSError: when a store does not answer.
    """
    storage.raise_outage(address, reason)
    if isinstance(reason, OSError) and reason.errno:
        return "unreadable file", f"{os.strerror(reason.errno)}: see to it that this user can read it"
    counted = f"unreadable {kind or 'file'}"
    system, path = storage.locate(address)
    with suppress(pa.ArrowException, OSError), system.open_input_file(path) as file:
        head = file.read(256)
        if storage.is_lfs_pointer(head):
            return LFS_FAULT
        if not head:
            return counted, "it is empty: copy it again"
    what = f"{kind} file".strip()
    return counted, f"it is no {what} that can be read ({' '.join(str(reason).split())}): copy or write it again"
