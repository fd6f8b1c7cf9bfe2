"""`tiglon checkpoint list | verify | show | diff`."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from data.storage import join_address, open_store, raise_outage
from launch.acting_values import changed_values
from launch.checkpoints import checkpoint_directory, find_checkpoint, read_checkpoint_manifest, read_tensor, verify_checkpoint
from launch.terminal import terminal
from trainer.checkpoint.directory import directory_name, saved_steps
from trainer.checkpoint.manifest import FILE, CheckpointManifest
from trainer.monitoring.progress import format_bytes, plural
from trainer.monitoring.records import json_safe
from trainer.printable import printable

checkpoint_app = typer.Typer(add_completion=False, help="Inspect checkpoints: list, verify, show, diff.", no_args_is_help=True)

CheckpointArgument = Annotated[
    str,
    typer.Argument(help="Checkpoint, run directory, or directory of checkpoints; local or object store."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@checkpoint_app.command("list")
def list_command(checkpoint: CheckpointArgument, as_json: JsonOption = False) -> None:
    """List the checkpoints of a run: step, tokens, bytes, the layout that wrote them.

    Example: tiglon checkpoint list runs/quickstart
    """
    rows = [_checkpoint_row(path) for path in _checkpoint_paths(checkpoint)]
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    table = Table("step", "tokens", "size", "files", "tensors", "written by", "state", title=f"checkpoints of {checkpoint}")
    for row in rows:
        counts = [f"{row['tokens']:,}", format_bytes(row["bytes"]), f"{row['files']:,}", f"{row['tensors']:,}"]
        table.add_row(str(row["step"]), *(counts if row["layout"] else ["?"] * 4), row["layout"], row["state"])
    _console().print(table)


@checkpoint_app.command("verify")
def verify_command(checkpoint: CheckpointArgument) -> None:
    """Compare every byte of a checkpoint, or of all checkpoints of a run, with the checksums.

    Exit status 1 when one is damaged. Example: tiglon checkpoint verify runs/quickstart
    """
    damaged = 0
    for path in _checkpoint_paths(checkpoint):
        try:
            verify_checkpoint(path)
            typer.echo(f"intact   {path}")
        except (ValueError, OSError) as error:
            raise_outage(path, error)
            damaged += 1
            typer.echo(printable(f"damaged  {error}"))
    if damaged:
        raise typer.Exit(1)


@checkpoint_app.command("show")
def show_command(
    checkpoint: CheckpointArgument,
    as_json: JsonOption = False,
    statistics: Annotated[bool, typer.Option("--numbers", help="Read the tensors: mean, RMS, extremes.")] = False,
) -> None:
    """Show what a checkpoint (of a run: its newest) holds: its origin and every tensor.

    Example: tiglon checkpoint show runs/quickstart --numbers
    """
    path = find_checkpoint(checkpoint)
    manifest = read_checkpoint_manifest(path)
    tensors = [_tensor_row(path, manifest, name, statistics) for name in manifest.shapes]
    meta = manifest.meta
    head = {
        "step": meta.step,
        "tokens": meta.tokens,
        "fingerprints": meta.fingerprints,
        "versions": meta.versions,
        "world": meta.world,
    }
    if as_json:
        typer.echo(json.dumps(json_safe({"path": path, **head, "config": meta.config, "tensors": tensors}), indent=1))
        return
    console = _console()
    for key, value in {"checkpoint": path, **head}.items():
        console.print(f"{key}: {_flat(value)}", highlight=False)
    table = Table(*(tensors[0] if tensors else ()))
    for row in tensors:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(table)


@checkpoint_app.command("diff")
def diff_command(first: CheckpointArgument, second: CheckpointArgument, as_json: JsonOption = False) -> None:
    """Compare two checkpoints: configuration, fingerprints, and every tensor.

    Exit status 1 when any tensor differs. Example: tiglon checkpoint diff runs/a runs/b
    """
    paths = (find_checkpoint(first), find_checkpoint(second))
    manifests = tuple(read_checkpoint_manifest(path) for path in paths)
    changes = [f"{key}: {_flat(a)} -> {_flat(b)}" for key, a, b in _meta_differences(*manifests)]
    changes += changed_values(manifests[0].meta.config, manifests[1].meta.config)
    rows = _tensor_differences(paths, manifests)
    unequal = [row for row in rows if row["difference"] != "equal"]
    if as_json:
        typer.echo(json.dumps({"first": paths[0], "second": paths[1], "changed": changes, "tensors": rows}, indent=1))
    else:
        for change in changes:
            typer.echo(printable(change))
        typer.echo(f"{len(rows) - len(unequal)} of {len(rows)} tensors are equal bit for bit")
        for row in unequal:
            typer.echo(printable(f"{row['tensor']}: {row['difference']}"))
    if unequal:
        raise typer.Exit(1)


def _console() -> Console:
    return terminal(width=None if sys.stdout.isatty() else 160)


def _checkpoint_paths(address: str) -> list[str]:
    """The checkpoint at an address, or all below it, oldest first; also those whose manifest is damaged."""
    place = checkpoint_directory(address)
    for directory in (place, join_address(place, "checkpoints")):
        store = open_store(directory)
        if FILE in store.entries():
            return [directory]
        if steps := saved_steps(store):
            return [join_address(directory, directory_name(step)) for step in steps]
    return [find_checkpoint(place)]


def _checkpoint_row(path: str) -> dict[str, Any]:
    step = int(Path(path.partition("?")[0]).name.removeprefix("step-")) if "step-" in path else 0
    row: dict[str, Any] = {"path": path, "step": step, "tokens": 0, "bytes": 0, "files": 0, "tensors": 0, "layout": ""}
    try:
        manifest = read_checkpoint_manifest(path)
    except ValueError as error:
        return {**row, "state": str(error)}
    store = open_store(path)
    missing = [name for name in manifest.files if name not in store.entries()]
    return {
        **row,
        "step": manifest.meta.step,
        "tokens": manifest.meta.tokens,
        "bytes": sum(file.bytes for file in manifest.files.values()),
        "files": len(manifest.files),
        "tensors": len(manifest.shapes),
        "layout": _flat(manifest.meta.world).replace("_parallel_size", ""),
        "state": f"{plural(len(missing), 'file')} missing" if missing else "complete",
    }


def _tensor_row(path: str, manifest: CheckpointManifest, name: str, statistics: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"tensor": name, "shape": list(manifest.shapes[name]), "dtype": manifest.dtypes[name]}
    if statistics:
        value = read_tensor(path, name, manifest).double()
        row |= {"mean": float(value.mean()), "rms": float(value.square().mean().sqrt())}
        row |= {"least": float(value.min()), "greatest": float(value.max()), "not finite": int((~value.isfinite()).sum())}
    return row


def _meta_differences(first: CheckpointManifest, second: CheckpointManifest) -> list[tuple[str, Any, Any]]:
    keys = ("step", "tokens", "fingerprints", "versions", "world")
    pairs = [(key, getattr(first.meta, key), getattr(second.meta, key)) for key in keys]
    return [pair for pair in pairs if pair[1] != pair[2]]


def _tensor_differences(paths: tuple[str, ...], manifests: tuple[CheckpointManifest, ...]) -> list[dict[str, str]]:
    first, second = manifests
    rows = []
    for name in {**first.shapes, **second.shapes}:
        if name not in first.shapes or name not in second.shapes:
            difference = f"only in the {'first' if name in first.shapes else 'second'}"
        elif first.shapes[name] != second.shapes[name]:
            difference = f"shape {first.shapes[name]} -> {second.shapes[name]}"
        else:
            difference = _difference(read_tensor(paths[0], name, first), read_tensor(paths[1], name, second))
        rows.append({"tensor": name, "difference": difference})
    return rows


def _difference(a: torch.Tensor, b: torch.Tensor) -> str:
    """ "equal" where dtype and bits are, else how many elements differ and by how much."""
    if a.dtype == b.dtype and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)):
        return "equal"
    gap = (a.double() - b.double()).abs()
    dtypes = "" if a.dtype == b.dtype else f"{a.dtype} -> {b.dtype}, ".replace("torch.", "")
    rms = float(a.double().square().mean().sqrt())
    count = f"{int((gap > 0).sum()):,} of {gap.numel():,} elements"
    return f"{dtypes}{count}, at most {float(gap.max()):.3g} (RMS of the first {rms:.3g})"


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {entry}" for key, entry in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)
