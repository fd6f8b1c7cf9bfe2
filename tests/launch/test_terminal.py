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


def test_no_number_of_a_table_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    """On 40 columns a loss of 6.2480 was shown as 6.24… and 3,072 tokens as 3…."""
    table = Table("context", "tokens", "loss (nats)", "standard error", "perplexity", title="a run evaluated with rope")
    table.add_row("64", "3,072", "6.2480", "0.0098", "516.99")
    terminal(width=80).print(table)
    assert "│ 3,072  │ 6.2480" in capsys.readouterr().out
    terminal(width=40).print(table)
    said = [line.split("  ") for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert said[0] == ["a run evaluated with rope"]
    assert [[cell.strip() for cell in line if cell.strip()] for line in said[1:]] == [
        ["context", "64"], ["tokens", "3,072"], ["loss (nats)", "6.2480"], ["standard error", "0.0098"],
        ["perplexity", "516.99"],
    ]  # fmt: skip
