"""Files on a disk or in an object store, for corpora and checkpoints alike."""

from data.storage.addresses import (
    absolute_path,
    hide_login,
    inside,
    is_remote,
    join_address,
    listed_address,
    locate,
    named_errors,
    raise_outage,
)
from data.storage.disk import DiskStore
from data.storage.files import (
    exists,
    is_lfs_pointer,
    read_bytes,
    read_json,
    refuse_lfs_pointer,
    remove,
    remove_drafts,
    replace_file,
    write_atomic,
)
from data.storage.listing import Listing, list_files, list_tree
from data.storage.objects import ObjectStore
from data.storage.only_writer import only_writer

__all__ = [
    "DiskStore",
    "Listing",
    "ObjectStore",
    "absolute_path",
    "exists",
    "hide_login",
    "inside",
    "is_lfs_pointer",
    "is_remote",
    "join_address",
    "list_files",
    "list_tree",
    "listed_address",
    "locate",
    "named_errors",
    "only_writer",
    "open_store",
    "raise_outage",
    "read_bytes",
    "read_json",
    "refuse_lfs_pointer",
    "remove",
    "remove_drafts",
    "replace_file",
    "write_atomic",
]


def open_store(address: str) -> DiskStore | ObjectStore:
    """The tree of files at a path or at an address such as s3://bucket/runs/a?region=eu-west-1.

    Raises:
        ValueError: for an address that names no known file system or no bucket.
    """
    return ObjectStore(address) if is_remote(address) else DiskStore(address)
