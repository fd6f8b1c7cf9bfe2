"""The progress line: live in a terminal, plain elsewhere."""

import io

import pytest

from trainer.progress import Progress, count, duration


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_where_there_is_no_terminal():
    stream = io.StringIO()
    with Progress(steps=100, tokens_per_step=1000, stream=stream) as progress:
        progress.update(10, 3.21987, 500.0, None)
        progress.line("evaluated")
        progress.update(20, 3.0, 20000.0, 75.0)
    assert stream.getvalue().splitlines() == [
        "step  10/100  loss 3.2199  500 tokens/s  ETA 3m00s  not saved yet",
        "evaluated",
        "step  20/100  loss 3.0000  20.0k tokens/s  ETA 4s  saved 1m15s ago",
    ]


def test_a_live_line_in_a_terminal(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    stream = _Terminal()
    with Progress(steps=100, tokens_per_step=1000, stream=stream) as progress:
        progress.update(50, 2.5, 1000.0, 4.0)
        progress.line("a line [not markup]")
    shown = stream.getvalue()
    assert "step  50/100  loss 2.5000  1,000 tokens/s  ETA 50s  saved 4s ago" in shown
    assert "a line [not markup]" in shown
    assert "\x1b[" in shown, "a live line is drawn over"


def test_quiet_ranks_write_nothing(capfd: pytest.CaptureFixture):
    with Progress(steps=1, tokens_per_step=1, stream=None) as progress:
        progress.update(1, 1.0, 1.0)
        progress.line("text")
    assert capfd.readouterr() == ("", "")


def test_an_unknown_speed_has_no_eta():
    stream = io.StringIO()
    Progress(steps=2, tokens_per_step=1, stream=stream).update(1, float("nan"), 0.0)
    assert stream.getvalue() == "step 1/2  loss nan  0 tokens/s  ETA unknown  not saved yet\n"


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (190, "3m10s"),
        (7500, "2h05m"),
        (1047600, "12d03h"),
        (float("inf"), "unknown"),
    ],
)
def test_durations(seconds: float, said: str):
    assert duration(seconds) == said


@pytest.mark.parametrize(
    ("number", "said"), [(950, "950"), (9999, "9,999"), (12345, "12.3k"), (4.56e6, "4.56M"), (1.2e9, "1.20B")]
)
def test_counts(number: float, said: str):
    assert count(number) == said
