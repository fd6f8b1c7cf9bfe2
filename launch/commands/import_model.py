"""`tiglon import`: a Hugging Face model as a checkpoint, with GROUP_BYTES of tensors in memory at a time."""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors import SafetensorError, safe_open

from data.storage import read_json, refuse_lfs_pointer
from launch.commands.export import INDEX
from launch.commands.new_directory import new_directory, whole_or_nothing
from launch.kept_tokenizer import TOKEN_IDS, kept_tokenizer, starting_config
from launch.load_config import build_config
from launch.toml import dump
from model.config import ModelConfig
from model.huggingface.families import family_of, imported_config
from model.huggingface.family import Family
from model.huggingface.weights import EMBEDDING, HEAD, StoredRows, has_stacks, stored_rows, stored_shapes
from trainer.checkpoint.format import StagedTensor, write_tensors
from trainer.checkpoint.manifest import FILE, CheckpointMeta, encode_manifest, merge_files
from trainer.checkpoint.rectangles import Rectangle

UNUSED = ("rotary_emb.inv_freq",)
"""Ends of names of tensors that old files hold and transformers ignores: frequencies are computed."""
FLOATS = ("F64", "F32", "F16", "BF16")
"""Types of numbers that a checkpoint holds, by their safetensors names."""
LAYER = re.compile(r"model\.layers\.(\d+)\.")
"""Beginning of a name of a tensor of a layer."""
COMPARED_ROWS = 1 << 14
"""Rows of an embedding in memory while it is compared with a head."""
GROUP_BYTES = 1 << 30
"""Tensors read before they are written, and about the size of a file of the checkpoint."""
CONFIG = "config.toml"
"""Configuration inside the imported checkpoint to start training from."""


def import_command(
    directory: Annotated[Path, typer.Argument(help="Hugging Face model: config.json and safetensors.")],
    output: Annotated[Path, typer.Option(help="New checkpoint directory.")],
    ignore: Annotated[list[str] | None, typer.Option(help="A key of config.json that changes nothing in the network.")] = None,
) -> None:
    """Import a Hugging Face model as a checkpoint to train from.

    Example: tiglon import exported --output runs/imported
    """
    for sentence in import_model(directory, output, ignore or ()):
        typer.echo(sentence)


def import_model(directory: Path, output: Path, ignore: Sequence[str] = ()) -> list[str]:
    """Import a Hugging Face model; returns the sentences to show the user.

    Args:
        ignore: keys of config.json that the user vouches for.

    Raises:
        ValueError, FileNotFoundError: one sentence; nothing is written.
    """
    store, name = new_directory(output)
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"{directory} is no Hugging Face model: it has no config.json")
    where = str(directory / "config.json")
    theirs = _read_json(directory / "config.json")
    family = family_of(theirs, where)
    model, position, length = imported_config(theirs, where, ignore)
    files = _files_by_name(directory)
    _check_layers(directory, files, model["num_hidden_layers"])
    config = build_config({"model": model, "position": position, "train": {"sequence_length": length}}, (), where)
    places = _stored_rows(config.model, family, where, has_stacks(files))
    further = _further(files, config.model.num_hidden_layers, family.further_layers(theirs))
    _check_tensors(directory, files, stored_shapes(places), config.model.tie_word_embeddings, further)
    tokenizer, remark = kept_tokenizer(directory, theirs, config.model.vocab_size)
    tokens = {key: _token_ids(theirs[key], f"{where}: {key}") for key in TOKEN_IDS if key in theirs}
    extra = {"imported_from": str(directory), "family": family.model_type, "token_ids": tokens}
    meta = CheckpointMeta(0, 0, config.model_dump(mode="json"), extra=extra)
    written = {}
    with whole_or_nothing(store, name, output) as staging:
        for index, group in enumerate(_read_groups(files, places)):
            file = f"part-{index:05d}.safetensors"
            written[file] = write_tensors(store, f"{staging}/{file}", group)
        for file, content in tokenizer.items():
            store.write(f"{staging}/{file}", content)
        store.write(f"{staging}/{CONFIG}", dump(starting_config(config, output, tokenizer)).encode())
        store.write(f"{staging}/{FILE}", encode_manifest(merge_files(meta, written)))
    count = sum(math.prod(place.shape) for place in places.values())
    told = f"imported {directory} ({family.architecture}, {count:,} parameters) to {output}"
    left_out = f"left out {len(further)} tensors of layers that predict further tokens: the network does without them"
    remarks = [*([left_out] if further else []), *([remark] if remark else [])]
    return [told, *remarks, f"a configuration to train it with: {output / CONFIG}"]


def _check_layers(directory: Path, files: dict[str, Path], layers: int) -> None:
    """Raises ValueError for more layers than tensors, before a network is made of so many."""
    if not files:
        raise ValueError(f"{directory} holds no tensors; copy it again")
    if layers > len(files):
        raise ValueError(f"{directory / 'config.json'} has num_hidden_layers = {layers}, but there are {len(files)} tensors")


def _read_json(path: Path) -> dict[str, Any]:
    """Raises ValueError for a file that holds no JSON object."""
    refuse_lfs_pointer(path)
    value = read_json(str(path))
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object; copy it again")
    return value


def _token_ids(value: Any, name: str) -> Any:
    """The id of a special token, a list of ids, or None. Raises ValueError for anything else."""
    ids = value if isinstance(value, list) else [value]
    if any(isinstance(each, bool) or not isinstance(each, int | None) for each in ids):
        raise ValueError(f"{name} = {str(value)[:80]!r} must be the id of a token, a list of ids or null; correct it")
    return value


def _further(names: Iterable[str], layers: int, number: int) -> set[str]:
    """Those of the `number` layers that files have behind the network's."""
    found = ((name, LAYER.match(name)) for name in names)
    return {name for name, layer in found if layer and layers <= int(layer[1]) < layers + number}


def _stored_rows(model: ModelConfig, family: Family, where: str, stacked: bool) -> dict[str, StoredRows]:
    """Where the network's tensors lie. Raises ValueError for sizes whose products no machine can count."""
    try:
        return stored_rows(model, family, stacked)
    except RuntimeError as error:
        raise ValueError(f"{where} describes tensors that are too large to count ({error}); correct its sizes") from None


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """An open safetensors file. Raises FileNotFoundError, or ValueError for a file that is not one."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there, though {INDEX} names it; copy the model again")
    refuse_lfs_pointer(path)
    try:
        file = safe_open(str(path), framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); copy it again") from None
    with file:
        yield file


def _files_by_name(directory: Path) -> dict[str, Path]:
    """Name of a tensor -> the file that holds it."""
    if (directory / INDEX).is_file():
        weight_map = _read_json(directory / INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{directory / INDEX} has no weight_map; copy it again")
        for name, file in weight_map.items():
            if not isinstance(file, str) or file != Path(file).name or not file.endswith(".safetensors"):
                raise ValueError(
                    f"{directory / INDEX} says that {name} is in {file!r}, no safetensors file beside it; copy it again"
                )
        return {name: directory / file for name, file in weight_map.items()}
    path = directory / "model.safetensors"
    if not path.is_file():
        pickled = sorted(file.name for kind in ("*.bin", "*.pt", "*.pth") for file in directory.glob(kind))
        advice = f"; {pickled[0]} can run code when it is read and is not: convert it to safetensors" if pickled else ""
        raise FileNotFoundError(f"{directory} has neither model.safetensors nor {INDEX}{advice}")
    with _opened(path) as file:
        return dict.fromkeys(file.keys(), path)


def _check_tensors(
    directory: Path, files: dict[str, Path], expected: dict[str, tuple[int, ...]], tied: bool, further: set[str]
) -> None:
    """Raises ValueError unless every tensor of the network is there once, in its shape, and no other but those of `further`
    layers."""
    own = {name for name in files if not name.endswith(UNUSED)} - further
    missing = [name for name in expected if name not in files]
    spare = [name for name in own if name not in expected and not (tied and name == HEAD)]
    for names, fault in ((missing, "lacks"), (spare, "has")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"{directory} {fault} {names[0]}{more}, which does not fit its config.json")
    for path in sorted(set(files.values())):
        with _opened(path) as file:
            stored = set(file.keys())
            for name in sorted(stored - files.keys()):
                raise ValueError(f"{path} has {name}, which {INDEX} does not name; copy the model again")
            for name in sorted(own & stored):
                if files[name] != path:
                    raise ValueError(f"{path} has {name}, which {INDEX} says is in {files[name].name}; copy the model again")
                _check_tensor(f"{path} has {name}", file.get_slice(name), expected.get(name))
            for name in sorted(name for name, where in files.items() if where == path and name not in stored):
                raise ValueError(f"{path} lacks {name}, which {INDEX} says is in it; copy the model again")
    if tied and HEAD in files:
        _check_tied(directory, files)


def _check_tensor(what: str, stored: Any, expected: tuple[int, ...] | None) -> None:
    """Raises ValueError for a tensor of another shape than its config.json asks for, or of another type than FLOATS."""
    if expected is not None and tuple(stored.get_shape()) != expected:
        raise ValueError(f"{what} of shape {tuple(stored.get_shape())}, its config.json asks for {expected}")
    if stored.get_dtype() not in FLOATS:
        raise ValueError(f"{what} as {stored.get_dtype()}; tiglon imports {', '.join(FLOATS)}: convert the model")


def _check_tied(directory: Path, files: dict[str, Path]) -> None:
    """Raises ValueError where the head that a tied model has stored is not its embedding."""
    with _opened(files[EMBEDDING]) as one, _opened(files[HEAD]) as other:
        embedding, head = one.get_slice(EMBEDDING), other.get_slice(HEAD)
        rows = embedding.get_shape()[0]
        same = embedding.get_shape() == head.get_shape() and all(
            torch.equal(embedding[start : start + COMPARED_ROWS], head[start : start + COMPARED_ROWS])
            for start in range(0, rows, COMPARED_ROWS)
        )
    if not same:
        raise ValueError(
            f"{directory} has a {HEAD} {tuple(head.get_shape())} that is not its {EMBEDDING}, though config.json has "
            f"tie_word_embeddings = true; set that to false to import both, or remove {HEAD} from the files"
        )


def _read_groups(files: dict[str, Path], places: dict[str, StoredRows]) -> Iterator[list[StagedTensor]]:
    """The network's tensors, in groups of little more than GROUP_BYTES."""
    group: list[StagedTensor] = []
    size = 0
    for path in sorted(set(files.values())):
        with _opened(path) as file:
            for name in sorted(name for name, place in places.items() if files[place.name] == path):
                place = places[name]
                rows = slice(place.start, place.start + place.shape[0])
                stored = file.get_slice(place.name)
                value = (stored[rows] if place.expert is None else stored[place.expert, rows]).contiguous().view(-1)
                whole = Rectangle((0,) * len(place.shape), place.shape)
                group.append(StagedTensor(f"weight/{name}", place.shape, whole, value))
                size += group[-1].nbytes
                if size > GROUP_BYTES:
                    yield group
                    group, size = [], 0
    if group:
        yield group
