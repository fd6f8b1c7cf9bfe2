import io

import pytest
from rich.markup import escape
from rich.table import Table

from launch.terminal import terminal

HOSTILE = "[red]x[/red] [link=http://a.example]y[/link] :bomb: \x1b[31m\x1b]0;title\x07 \\[a]"
SHOWN = r"[red]x[/red] [link=http://a.example]y[/link] :bomb: \x1b[31m\x1b]0;title\x07 \[a]"


@pytest.mark.parametrize("where", ["line", "cell", "heading", "title"])
def test_the_text_of_others_is_text(where: str, capsys: pytest.CaptureFixture[str]) -> None:
    console = terminal(width=200)
    if where == "line":
        console.print(HOSTILE)
    else:
        table = Table(HOSTILE if where == "heading" else "key", title=HOSTILE if where == "title" else None, min_width=150)
        table.add_row(HOSTILE if where == "cell" else "value")
        console.print(table)
    assert SHOWN in (said := capsys.readouterr().out) and "\x1b" not in said


def test_on_a_terminal_too(monkeypatch: pytest.MonkeyPatch) -> None:
    console = terminal(width=200)
    console.file, console._force_terminal = io.StringIO(), True
    console.print(HOSTILE, highlight=False)
    assert console.file.getvalue().rstrip() == SHOWN


def test_markup_is_there_for_those_who_ask(capsys: pytest.CaptureFixture[str]) -> None:
    terminal(markup=True, width=200).print(f"[bold]a[/] {escape('[red]')}")
    assert capsys.readouterr().out == "a [red]\n"
