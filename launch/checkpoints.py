"""`tiglon checkpoint list | verify | show | diff`: what there is, whether it is intact, what is in it, what differs."""

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from data.storage import stop_at_outage
from launch.resume import changes
from trainer.checkpoint import find, read_manifest, read_tensor, verify
from trainer.manifest import FILE, Manifest
from trainer.metrics import strict
from trainer.progress import plural, size
from trainer.restore import directory_name, steps
from trainer.store import join, open_store

checkpoint_app = typer.Typer(add_completion=False, help="Look at checkpoints: list, verify, show, diff.", no_args_is_help=True)

Place = Annotated[str, typer.Argument(help="Checkpoint, run directory, or directory of checkpoints; local or object store.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@checkpoint_app.command("list")
def list_command(place: Place, as_json: Json = False) -> None:
    """The checkpoints of a run: step, tokens, bytes, the layout that wrote them.

    Example: tiglon checkpoint list runs/quickstart
    """
    rows = [_row(path) for path in _all(place)]
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    table = Table("step", "tokens", "size", "files", "tensors", "written by", "state", title=f"checkpoints of {place}")
    for row in rows:
        counted = (
            [f"{row['tokens']:,}", size(row["bytes"]), f"{row['files']:,}", f"{row['tensors']:,}"] if row["layout"] else []
        )
        table.add_row(str(row["step"]), *(counted or ["?"] * 4), row["layout"], row["state"])
    _console().print(table)


@checkpoint_app.command("verify")
def verify_command(place: Place) -> None:
    """Read every byte of a checkpoint, or of all checkpoints of a run, and compare with the checksums.

    Exit status 1 when one is damaged. Example: tiglon checkpoint verify runs/quickstart
    """
    bad = 0
    for path in _all(place):
        try:
            verify(path)
            typer.echo(f"intact   {path}")
        except (ValueError, OSError) as error:
            stop_at_outage(path, error)
            bad += 1
            typer.echo(f"damaged  {error}")
    if bad:
        raise typer.Exit(1)


@checkpoint_app.command("show")
def show_command(
    place: Place,
    as_json: Json = False,
    numbers: Annotated[bool, typer.Option(help="Read the tensors: mean, RMS, extremes.")] = False,
) -> None:
    """What is in a checkpoint (of a run: its newest): where it comes from, and every tensor.

    Example: tiglon checkpoint show runs/quickstart --numbers
    """
    path = find(place)
    manifest = read_manifest(path)
    tensors = [_tensor_row(path, manifest, name, numbers) for name in manifest.shapes]
    meta = manifest.meta
    head = {
        "step": meta.step,
        "tokens": meta.tokens,
        "fingerprints": meta.fingerprints,
        "versions": meta.versions,
        "world": meta.world,
    }
    if as_json:
        typer.echo(json.dumps(strict({"path": path, **head, "config": meta.config, "tensors": tensors}), indent=1))
        return
    console = _console()
    for key, value in {"checkpoint": path, **head}.items():
        console.print(f"{key}: {_flat(value)}", highlight=False)
    columns = list(tensors[0]) if tensors else []
    table = Table(*columns)
    for row in tensors:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(table)


@checkpoint_app.command("diff")
def diff_command(first: Place, second: Place, as_json: Json = False) -> None:
    """What differs between two checkpoints: configuration, fingerprints, and every tensor.

    Exit status 1 when any tensor differs. Example: tiglon checkpoint diff runs/a runs/b
    """
    paths = (find(first), find(second))
    manifests = tuple(read_manifest(path) for path in paths)
    said = [f"{key}: {a} -> {b}" for key, a, b in _meta_differences(*manifests)]
    said += changes(manifests[0].meta.config, manifests[1].meta.config)
    rows = _tensor_differences(paths, manifests)
    if as_json:
        typer.echo(json.dumps({"first": paths[0], "second": paths[1], "changed": said, "tensors": rows}, indent=1))
    else:
        for sentence in said:
            typer.echo(sentence)
        equal = sum(row["difference"] == "equal" for row in rows)
        typer.echo(f"{equal} of {len(rows)} tensors are equal bit for bit")
        for row in rows:
            if row["difference"] != "equal":
                typer.echo(f"{row['tensor']}: {row['difference']}")
    if any(row["difference"] != "equal" for row in rows):
        raise typer.Exit(1)


def _console() -> Console:
    return Console(width=None if Console().is_terminal else 160, soft_wrap=False)


def _all(place: str) -> list[str]:
    """The checkpoint at a place, or all of them oldest first; also those whose manifest is damaged."""
    for address in (place, join(place, "checkpoints")):
        store = open_store(address)
        if FILE in store.entries():
            return [address]
        found = steps(store)
        if found:
            return [join(address, directory_name(step)) for step in found]
    return [find(place)]


def _row(path: str) -> dict[str, Any]:
    step = int(Path(path.partition("?")[0]).name.removeprefix("step-")) if "step-" in path else 0
    row: dict[str, Any] = {"path": path, "step": step, "tokens": 0, "bytes": 0, "files": 0, "tensors": 0, "layout": ""}
    try:
        manifest = read_manifest(path)
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
        "layout": _flat(manifest.meta.world),
        "state": f"{plural(len(missing), 'file')} missing" if missing else "complete",
    }


def _tensor_row(path: str, manifest: Manifest, name: str, numbers: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"tensor": name, "shape": list(manifest.shapes[name]), "dtype": manifest.dtypes[name]}
    if numbers:
        value = read_tensor(path, name, manifest).double()
        row |= {"mean": float(value.mean()), "rms": float(value.square().mean().sqrt())}
        row |= {"least": float(value.min()), "greatest": float(value.max()), "not finite": int((~value.isfinite()).sum())}
    return row


def _meta_differences(first: Manifest, second: Manifest) -> list[tuple[str, Any, Any]]:
    keys = ("step", "tokens", "fingerprints", "versions", "world")
    pairs = [(key, getattr(first.meta, key), getattr(second.meta, key)) for key in keys]
    return [pair for pair in pairs if pair[1] != pair[2]]


def _tensor_differences(paths: tuple[str, ...], manifests: tuple[Manifest, ...]) -> list[dict[str, str]]:
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
    if a.dtype == b.dtype and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)):
        return "equal"
    gap = (a.double() - b.double()).abs()
    kinds = "" if a.dtype == b.dtype else f"{a.dtype} -> {b.dtype}, ".replace("torch.", "")
    scale = float(a.double().square().mean().sqrt())
    count = f"{int((gap > 0).sum()):,} of {gap.numel():,} numbers"
    return f"{kinds}{count}, at most {float(gap.max()):.3g} (RMS of the first {scale:.3g})"


def _flat(value: Any) -> str:
    return ", ".join(f"{key} {entry}" for key, entry in value.items()) if isinstance(value, dict) else str(value)
