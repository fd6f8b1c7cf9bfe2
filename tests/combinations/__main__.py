"""Check whole configurations and print failing ones as command lines; exit status 1 if any failed.

    python -m tests.combinations                                            the covering array
    python -m tests.combinations --random N --seed S                        N drawn configurations
    python -m tests.combinations --set "tensor parallel=2" --set recompute=selective

With --set the one configuration of all first values but these (tests/combinations/options.py has their names).
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

from tests.combinations import array, corpus
from tests.combinations.check import check
from tests.combinations.options import OPTIONS, Choice, default
from tests.combinations.refusals import REFUSALS
from tests.combinations.run import Place
from tests.combinations.shrink import command, shrink
from tests.object_store import served_bucket

SHORTENED = 3
"""Failing configurations that are shortened: that takes many runs."""


def main(arguments: list[str] | None = None) -> int:
    """0: nothing failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.combinations", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--random", type=int, metavar="N", help="draw N configurations; default the covering array")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing")
    parser.add_argument("--part", default="1/1", metavar="K/N", help="every N-th configuration, from the K-th on")
    parser.add_argument("--first", type=int, default=0, metavar="K", help="pass over the configurations before number K")
    parser.add_argument("--only", type=int, metavar="K", help="configuration number K (from 0) alone")
    parser.add_argument("--set", action="append", metavar="OPTION=VALUE", help="check the default with these values alone")
    parser.add_argument("--keep", metavar="FOLDER", help="where shards and runs stay; default nowhere")
    chosen = parser.parse_args(arguments)
    try:
        configurations = [(0, changed(chosen.set))] if chosen.set else _several(chosen)
    except ValueError as error:
        parser.error(str(error))
    wanted = array.wanted()
    print(
        f"{len(OPTIONS)} options, {sum(len(option.values) for option in OPTIONS)} values, {len(wanted)} pairs, "
        f"{len(REFUSALS)} refused; {len(configurations)} configurations",
        flush=True,
    )
    with ExitStack() as stack:
        folder = Path(chosen.keep or stack.enter_context(tempfile.TemporaryDirectory()))
        shortened = 0 if chosen.set else SHORTENED
        return 1 if examine(configurations, make_place(folder, stack), shortened) else 0


def changed(values: list[str]) -> Choice:
    """The first value of everything but for "option=value" texts.

    Raises:
        ValueError: a text names no option or no value of it.
    """
    choice = default()
    for text in values:
        name, _, value = text.partition("=")
        legal = {option.name: list(option.values) for option in OPTIONS}
        if name not in legal:
            raise ValueError(f"--set {text!r} names no option; legal: {', '.join(legal)}")
        if value not in legal[name]:
            raise ValueError(f"--set {text!r} names no value of '{name}'; legal: {', '.join(legal[name])}")
        choice[name] = value
    return choice


def _several(chosen: argparse.Namespace) -> list[tuple[int, Choice]]:
    """The part asked for of the array, or of those drawn, with their numbers."""
    part, parts = map(int, chosen.part.split("/"))
    configurations = list(enumerate(array.whole() if chosen.random is None else array.drawn(chosen.random, chosen.seed)))
    return [pair for pair in configurations[chosen.first :][part - 1 :: parts] if chosen.only in (None, pair[0])]


def make_place(folder: Path, stack: ExitStack) -> Place:
    """Shards, an object store and a folder for runs."""
    shards = folder / "corpus"
    if not shards.is_dir():
        shards.mkdir(parents=True)
        corpus.make(shards)
    return Place(shards, stack.enter_context(served_bucket()), folder / "runs")


def examine(configurations: Iterable[tuple[int, Choice]], place: Place, shortened: int = SHORTENED) -> int:
    """Check each; how many failed, each printed, the first few shortened."""
    passed, failed, began = 0, 0, time.monotonic()
    for number, choice in configurations:
        start = time.monotonic()
        fault = check(choice, place, f"c{number}")
        print(f"{number}: {fault or 'ok'} ({time.monotonic() - start:.1f} s)", flush=True)
        passed, failed = passed + (not fault), failed + bool(fault)
        if fault:
            print(_shortened(choice, place) if failed <= shortened else command(choice, place), flush=True)
    print(f"{passed} passed, {failed} failed in {time.monotonic() - began:.0f} s", flush=True)
    return failed


def _shortened(choice: Choice, place: Place) -> str:
    short = shrink(choice, lambda other: bool(check(other, place, "shrinking")))
    plain = default()
    what = ", ".join(f"{name} = {value}" for name, value in short.items() if value != plain[name])
    return f"  it takes: {what or 'nothing but the defaults'}\n  {command(short, place)}"


if __name__ == "__main__":
    sys.exit(main())
