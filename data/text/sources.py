"""Find the input files and cut them into tasks.

A task is a list of consecutive parts of files that one process reads from beginning to end. The cut depends on the files
and the task size only, so neither the number of workers nor a restart changes which shard a document is written to.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from data import storage
from data.text.faults import READING_FAULTS, unreadable
from data.text.fields import column_fault, listed
from data.text.folders import TRAINING_SPLITS, choose_files, splits_in
from data.text.formats import FileKind, InputPart, OnError, RejectedDocuments, TextFormat, means
from data.text.kinds import COMPRESSIONS, ENDINGS, kind_of
from data.text.tables import open_parquet

BROKEN_LINK, SECOND_LINK = "broken link", "link to another file of the input"
"""Why files are left out."""


@dataclass(frozen=True)
class InputFiles:
    """The files that the inputs mean."""

    files: list[tuple[str, int]] = field(default_factory=list)  # address, size in bytes
    left_out: dict[str, list[str]] = field(default_factory=dict)  # addresses by reason

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(size for _, size in self.files)

    def remarks(self) -> list[str]:
        """A sentence for each reason for which files were left out."""
        return [
            f"left out {len(gone):,} {'file' if len(gone) == 1 else 'files'}, {reason}: {listed(map(os.path.basename, gone))}"
            for reason, gone in self.left_out.items()
        ]


def find_files(inputs: list[str]) -> InputFiles:
    """The files of all inputs, in a fixed order; of links in a folder to the same file one, or none where it is read itself.

    Raises FileNotFoundError for an input that does not exist or holds nothing to read, ValueError for one given twice, or a
    folder with training and held-out data of a dataset.
    """
    found, linked = InputFiles(), set()
    for address in inputs:
        linked |= _add_files(found, address)
    _keep_each_once(found, linked)
    return found


def check_fields(found: InputFiles, text_format: TextFormat) -> None:
    """Raises ValueError for a --field of files that are not there, or all of which have an earlier one."""
    addresses = [address for address, _ in found.files]
    used = {text_format.field_rule(address) for address in addresses}
    for rule in text_format.fields:
        option = f"--field '{rule[0]}={rule[1]}'"
        if not any(means(rule[0], address) for address in addresses):
            raise ValueError(
                f"{option} is for no input file: write the files as the input is written, or a name such as '*.jsonl'"
            )
        if rule not in used:
            raise ValueError(f"{option} is never used: an earlier --field is for all of its files; give the narrower one first")


def refuse_inside(output: str, inputs: list[str]) -> None:
    """Raises ValueError for an output in a folder of the input, where the next start would take it for text."""
    for address in inputs:
        if not storage.is_remote(output) and not storage.is_remote(address):
            folder, inner = (os.path.realpath(storage.locate(each)[1]) for each in (address, output))
            if os.path.isdir(folder) and (inner == folder or inner.startswith(f"{folder}/")):
                raise ValueError(
                    f"--output '{output}' lies in the input '{address}', which would then hold it: choose another one"
                )


def plan_tasks(inputs: list[str], text_format: TextFormat, task_bytes: int | None = None) -> list[list[InputPart]]:
    """Find the files of all inputs and cut them into tasks. Raises as `find_files` and `cut_tasks` do."""
    return cut_tasks(find_files(inputs), text_format, task_bytes)


def cut_tasks(found: InputFiles, text_format: TextFormat, task_bytes: int | None = None) -> list[list[InputPart]]:
    """Cut files into tasks of about `task_bytes` of input, in a fixed order.

    The default size is a 64th of the input, at least 1 MiB and at most 256 MiB. Raises ValueError for a size below 1, a file
    of unknown format, or one without the column of text.
    """
    size = min(max(found.bytes // 64, 1 << 20), 256 << 20) if task_bytes is None else task_bytes
    if size < 1:
        raise ValueError(f"task_bytes = {size}: give at least 1 byte of input for a shard, or leave it out")
    tasks: list[list[InputPart]] = []
    space_left = 0
    for address, bytes_ in found.files:
        for part in _cut(address, bytes_, text_format, size):
            if space_left < part.bytes or not tasks:
                tasks.append([])
                space_left = max(size, part.bytes)
            tasks[-1].append(part)
            space_left -= part.bytes
    return tasks


def _add_files(found: InputFiles, address: str) -> set[str]:
    """Add the files that an input means; of a folder or a pattern without what is no document.

    Returns the addresses of those that are reached by a link in it.
    """
    listing = storage.list_tree(address)
    sizes, folder = dict(listing.files), storage.locate(address)[1]
    paths = list(sizes)
    if not paths and not listing.broken_links:
        raise FileNotFoundError(f"no files at '{address}'; give a file, a folder or a pattern")
    kept, left_out = (paths, {}) if paths == [folder] else choose_files(paths)
    if all(path.startswith(f"{folder}/") for path in paths) and (splits := splits_in(kept, folder)):
        training = next(files for split, files in splits.items() if split in TRAINING_SPLITS)
        raise ValueError(
            f"'{address}' holds the splits {', '.join(splits)} of a dataset: name the files of one, for example "
            f"'{storage.join_address(address, training)}', so that nothing held out is trained on, "
            f"or read all by a pattern such as '{storage.join_address(address, '**')}'"
        )
    if not kept:
        names = {os.path.basename(path) for path in paths} | {
            f"{os.path.basename(p)} (broken link)" for p in listing.broken_links
        }
        raise FileNotFoundError(
            f"'{address}' holds no text and no data, but {listed(sorted(names))}: give files of {', '.join(ENDINGS)}"
        )
    found.files.extend((storage.listed_address(address, path), sizes[path]) for path in kept)
    for reason, gone in {**left_out, **({BROKEN_LINK: listing.broken_links} if listing.broken_links else {})}.items():
        found.left_out.setdefault(reason, []).extend(storage.listed_address(address, path) for path in gone)
    if storage.is_remote(address) or kept == [folder]:
        return set()
    return {storage.listed_address(address, path) for path in _linked(kept)}


def _linked(paths: list[str]) -> list[str]:
    """The local files that are reached by a link below the folder that all of them lie in."""
    folder = os.path.commonpath([os.path.dirname(path) for path in paths])
    origin = os.path.realpath(folder)
    return [path for path, real in _real_paths(paths).items() if real != os.path.join(origin, path[len(folder) :].lstrip("/"))]


def _real_paths(paths: Iterable[str]) -> dict[str, str]:
    """Each local path with the file that it leads to."""
    folders = {folder: os.path.realpath(folder) for folder in {os.path.dirname(path) for path in paths}}
    found = {path: os.path.join(folders[os.path.dirname(path)], os.path.basename(path)) for path in paths}
    return {path: os.path.realpath(real) if os.path.islink(real) else real for path, real in found.items()}


def _keep_each_once(found: InputFiles, linked: set[str]) -> None:
    """Leave out the links to files that are read by another name, so that no document is counted double.

    Raises ValueError for a file that is meant twice by no link.
    """
    local = {address: storage.locate(address)[1] for address, _ in found.files if not storage.is_remote(address)}
    real = _real_paths([*local.values()])
    first: dict[str, int] = {}
    gone = set()
    for number in sorted(range(len(found.files)), key=lambda number: found.files[number][0] in linked):  # links come last
        address = found.files[number][0]
        before = first.setdefault(real[local[address]] if address in local else address, number)
        if before == number:
            continue
        if address not in linked:
            other = found.files[before][0]
            also = "" if other == address else f", also as '{address}'"
            raise ValueError(f"'{other}' is given twice{also}: name each input once, so that no document is counted double")
        gone.add(number)
        found.left_out.setdefault(SECOND_LINK, []).append(address)
    found.files[:] = [file for number, file in enumerate(found.files) if number not in gone]


def _cut(address: str, size: int, text_format: TextFormat, task_bytes: int) -> Iterator[InputPart]:
    named = kind_of(address)
    if named is None:
        raise ValueError(
            f"'{address}' is of no known kind: use {', '.join(ENDINGS)} (text and JSON also as {', '.join(COMPRESSIONS)});"
            " rename it, or leave it out with a pattern such as 'folder/*.parquet'"
        )
    (kind, compression), name = named, text_format.field_of(address)
    if kind == "parquet":
        yield from _row_groups(address, size, name, text_format.on_error, task_bytes)
    elif _can_be_cut(kind, compression, text_format) and (size <= task_bytes or _opens(address)):
        for start in range(0, size, task_bytes):
            stop = min(start + task_bytes, size)
            yield InputPart(address, kind, None, start, stop, stop - start, name)
    else:
        yield InputPart(address, kind, compression, 0, size, size, name)


def _can_be_cut(kind: FileKind, compression: str | None, text_format: TextFormat) -> bool:
    """Whether a document is a line of the file as it is."""
    is_lines = kind == "jsonl" or (kind == "text" and text_format.text_documents == "line")
    return is_lines and not compression and text_format.is_utf_8


def _opens(address: str) -> bool:
    """Whether a file can be opened; one that cannot is not cut, so that it is counted once."""
    system, path = storage.locate(address)
    try:
        system.open_input_file(path).close()
    except OSError as reason:
        storage.raise_outage(address, reason)
        return False
    return True


def _row_groups(address: str, size: int, name: str, on_error: OnError, task_bytes: int) -> Iterator[InputPart]:
    """Runs of row groups. With on_error "skip" an unreadable file is one part, so that `read_documents` counts it once."""
    rejected, sizes = RejectedDocuments(on_error), [size]
    try:
        with open_parquet(address) as file:
            metadata, fault = file.metadata, column_fault(file.schema_arrow, name)
        if fault:
            rejected.add("no text column", address, f"{fault}; choose with --field")
        else:
            sizes = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
    except READING_FAULTS as reason:
        counted, remedy = unreadable(address, "Parquet", reason)
        rejected.add(counted, address, remedy)
    start = weight = 0
    for group, bytes_ in enumerate(sizes):
        if weight and weight + bytes_ > task_bytes:
            yield InputPart(address, "parquet", None, start, group, weight, name)
            start, weight = group, 0
        weight += bytes_
    if sizes:
        yield InputPart(address, "parquet", None, start, len(sizes), weight, name)
