"""A directory that a command writes completely, or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data.storage import DiskStore, is_remote, named_errors


def new_directory(output: Path) -> tuple[DiskStore, str]:
    """(store of the parent directory, name in it) of a directory to create.

    Raises:
        ValueError: an object store, or a directory that is not empty.
    """
    if is_remote(str(output).replace(":/", "://", 1)):  # a Path has joined the two slashes
        raise ValueError(f"--output {output} must be a local directory; copy it to an object store afterwards")
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"--output {output} exists and is not empty; give a new directory")
    return DiskStore(str(output.absolute().parent)), output.absolute().name


@contextmanager
def whole_or_nothing(store: DiskStore, name: str, output: Path) -> Iterator[str]:
    """A staging folder to write into, renamed to `name` at the end; on any error it is removed."""
    staging = store.staging_name(name)
    try:
        with named_errors(str(output)):
            store.remove(staging)
            yield staging
            store.publish(name)
    except BaseException:
        with suppress(OSError):
            store.remove(staging)
        raise
