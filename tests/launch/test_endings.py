"""Runs ended at random moments in every way come out as if nothing had happened; a hundred: `python -m benchmarks.endings`."""

from pathlib import Path

import pytest

from tests.launch.endings import KINDS, Chain, Endings, plan
from tests.launch.screens import Seen, faults


def _short(chains: list[Chain]) -> list[Chain]:
    """The same endings of one rank with fold and of two with zero, so that two unbroken runs do instead of four."""
    return [Chain(chain.ranks, {1: "fold", 2: "zero"}[chain.ranks], chain.endings) for chain in chains]


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_twelve_endings_cost_nothing_and_nothing_untrue_is_said(tmp_path: Path) -> None:
    lines: list[str] = []
    endings = Endings(tmp_path, lines.append)
    chains = _short(plan(12, seed=0))
    assert {ending.kind for chain in chains for ending in chain.endings} == set(KINDS)
    wrong = []
    for number, chain in enumerate(chains):
        for outcome in endings.chain(chain, number):
            if outcome.faults:
                wrong += [f"screen of {outcome.kind or 'let finish'}:", *(f"    {line}" for line in outcome.screen[-12:])]
    if wrong:
        pytest.fail("\n".join([*lines, "", *wrong]), pytrace=False)
    assert endings.compared >= 1


@pytest.mark.parametrize("count", [11, 100])
def test_a_plan_has_every_kind_as_often_as_any_other(count: int) -> None:
    chains = plan(count, seed=3)
    kinds = [ending.kind for chain in chains for ending in chain.endings]
    assert len(kinds) == count and max(map(kinds.count, KINDS)) - min(map(kinds.count, KINDS)) <= 1
    assert chains == plan(count, seed=3) != plan(count, seed=4)
    assert all(chain.ranks == 2 for chain in chains if "kill-rank" in [ending.kind for ending in chain.endings])
    assert {ending.kind for chain in plan(5, seed=0, only="sighup") for ending in chain.endings} == {"sighup"}


STEP = "step  5/24  loss 3.0"
KILLED = "tiglon: rank 1 was killed (SIGKILL); out of memory?"


def _faults(tmp_path: Path, kind: str, status: int, lines: list[str], floor: int = 0) -> str:
    return "; ".join(faults(Seen(kind, status, lines, tmp_path, f"{tmp_path}/checkpoints", 2, 24, 2, floor)))


@pytest.mark.parametrize(
    ("kind", "status", "lines"),
    [
        ("sigterm", -15, []),
        ("sigusr1", 138, ["W torchrun: shutting down workers"]),
        ("sigint", 130, ["tiglon: interrupted before training began"]),
        ("sigint", -2, ["Traceback (most recent call last):", '  File "<frozen runpy>", line 1', "KeyboardInterrupt"]),
        ("double-sigint", 130, [STEP, "tiglon: left at once by a second SIGINT; nothing is saved"]),
        ("kill-rank", 137, [STEP, KILLED]),
        ("full-disk", 2, ["tiglon: /run/logs/rank-0.log cannot be written (No space left on device); make room"]),
        ("", 0, ["done: /run has all 24 steps; raise train.steps to continue"]),
    ],
)
def test_a_true_screen_is_believed(tmp_path: Path, kind: str, status: int, lines: list[str]) -> None:
    assert _faults(tmp_path, kind, status, lines) == ""


@pytest.mark.parametrize(
    ("kind", "status", "lines", "words"),
    [
        ("sigterm", -15, [STEP], "wanted 85"),
        ("sigterm", 0, [STEP, "stopped by SIGTERM at step 5; saved, resume to continue"], "status 0, but the last line is"),
        ("sigterm", 85, [STEP, "stopped by SIGTERM at step 5; saved, resume to continue"], "status 85 without"),
        ("sighup", 85, ["stopped by SIGHUP at step 5; saved in /a/step-00000005; the same command resumes"], "step 5 was said"),
        ("sigint", 130, [STEP, "tiglon: interrupted"], "one SIGINT in the middle of training"),
        ("sigint", 130, [], "without a sentence"),
        (
            "sigint",
            130,
            ["Traceback (most recent call last):", '  File "/x/launch/cli.py", line 1'],
            "a traceback is on the screen",
        ),
        ("kill-rank", 137, [STEP], "a line that names the rank"),
        ("kill-rank", 137, ["resumed from /a/step-00000002: step 2", KILLED], "resumed from step 2, but 4 was said"),
        ("kill-rank", 137, ["step  1/24  loss 3.0", KILLED], "began anew, but step 4"),
        ("store-gone", 1, [STEP], "a sentence that says why"),
        ("closed-pipe", 1, [STEP], "wanted 0"),
        ("", 0, ["checkpoint of step 24 complete after 0.01 s"], "step 24 was said to be there"),
    ],
)
def test_an_untrue_screen_is_noticed(tmp_path: Path, kind: str, status: int, lines: list[str], words: str) -> None:
    assert words in _faults(tmp_path, kind, status, lines, floor=4)
