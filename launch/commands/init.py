"""`tiglon init`: a configuration to begin one's own from."""

from typing import Annotated

import typer
from rich.table import Table

from launch.shipped import lesson, shipped_names, shipped_text
from launch.terminal import terminal


def init_command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A shipped configuration; without it they are listed.")] = "",
) -> None:
    """Print a shipped configuration with every key and its meaning, to make your own from.

    Example: tiglon init gpt-124m > my.toml
    """
    if not name:
        _list()
        return
    text = shipped_text(name)  # a wrong name is refused before torch is imported
    from launch.complete_file import complete_file

    typer.echo(complete_file(text), nl=False)


def _list() -> None:
    table = Table("name", "what it shows", box=None, padding=(0, 2, 0, 0))
    for name in shipped_names():
        table.add_row(name, lesson(shipped_text(name)))
    console = terminal()
    console.print(table)
    console.print("\ntiglon init NAME > my.toml   # the whole file", markup=False, highlight=False)
