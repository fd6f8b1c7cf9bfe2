"""The progress line: live in a terminal, plain elsewhere."""

import io

import pytest

from trainer.monitoring.progress import (
    Progress,
    checkpoint_age,
    format_bytes,
    format_count,
    format_duration,
    format_perplexity,
    left_behind,
    plural,
)


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_where_there_is_no_terminal():
    stream = io.StringIO()
    with Progress(steps=100, tokens_before=lambda steps: 1000 * steps, stream=stream) as progress:
        progress.update(10, 3.21987, 500.0)
        progress.line("evaluated")
        progress.update(20, 3.0, 20000.0, "saved 1m15s ago")
    assert stream.getvalue().splitlines() == [
        "step  10/100  loss 3.2199  500 tokens/s  ETA 3m00s  not saved yet",
        "evaluated",
        "step  20/100  loss 3.0000  20.0k tokens/s  ETA 4s  saved 1m15s ago",
    ]


def test_a_live_line_in_a_terminal(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    stream = _Terminal()
    with Progress(steps=100, tokens_before=lambda steps: 1000 * steps, stream=stream) as progress:
        progress.update(50, 2.5, 1000.0, "saved 4s ago")
        progress.line("a line [not markup]")
    shown = stream.getvalue()
    assert "step  50/100  loss 2.5000  1,000 tokens/s  ETA 50s  saved 4s ago" in shown
    assert "a line [not markup]" in shown
    assert "\x1b[" in shown, "a live line is drawn over"


def test_quiet_ranks_write_nothing(capfd: pytest.CaptureFixture):
    with Progress(steps=1, tokens_before=lambda steps: steps, stream=None) as progress:
        progress.update(1, 1.0, 1.0)
        progress.line("text")
    assert capfd.readouterr() == ("", "")


def test_the_time_left_is_that_of_the_batches_left():
    """Batches of 1,000 tokens, of 9,000 from batch 60 on; 40 of 100 updates are done, with batch 40 or 70 to come."""
    for passed_over, seconds in ((0, 20 * 1 + 40 * 9), (30, 60 * 9)):
        stream = io.StringIO()
        progress = Progress(100, lambda batch: 1000 * batch + 8000 * max(0, batch - 60), stream)
        progress.update(40, 2.0, 1000.0, passed_over=passed_over)
        assert f"ETA {seconds // 60}m{seconds % 60:02d}s" in stream.getvalue()


def test_a_step_and_its_batch_are_told_where_they_differ():
    assert left_behind(7, 7) == ""
    assert left_behind(7, 8).startswith("step 7 continues with batch 8, since rewinds left 1 batch behind: ")
    assert left_behind(1000, 3000).startswith("step 1,000 continues with batch 3,000, since rewinds left 2,000 batches behind")


def test_an_unknown_speed_has_no_eta():
    stream = io.StringIO()
    Progress(steps=2, tokens_before=lambda steps: steps, stream=stream).update(1, float("nan"), 0.0)
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
    assert format_duration(seconds) == said


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (950, "950"),
        (9999, "9,999"),
        (9999.7, "10.0k"),
        (12345, "12.3k"),
        (999_949, "999.9k"),
        (999_951, "1.00M"),
        (4.56e6, "4.56M"),
        (9.996e6, "10.0M"),
        (1.2e9, "1.20B"),
        (15e12, "15.0T"),
    ],
)
def test_counts(number: float, said: str):
    assert format_count(number) == said


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1234, "1.23 kB"),
        (999_700, "1 MB"),
        (45.62e6, "45.6 MB"),
        (7e12, "7 TB"),
        (1.23e15, "1,230 TB"),
    ],
)
def test_sizes(number: float, said: str):
    assert format_bytes(number) == said


def test_plurals():
    assert [plural(n, "layer") for n in (0, 1, 2, 1024)] == ["0 layers", "1 layer", "2 layers", "1,024 layers"]
    assert [plural(n, "batch", "batches") for n in (1, 2)] == ["1 batch", "2 batches"]


def test_the_age_of_a_checkpoint_is_told_only_where_it_is_known():
    assert [checkpoint_age(c, 100.0) for c in (None, (7, None), (7, 88.0))] == [
        "not saved yet",
        "saved at step 7",
        "saved 12s ago",
    ]


@pytest.mark.parametrize(("loss", "said"), [(0.0, "1.00"), (7.4206, "1,670.04"), (710.0, "inf"), (float("nan"), "nan")])
def test_perplexities(loss: float, said: str):
    assert format_perplexity(loss) == said
