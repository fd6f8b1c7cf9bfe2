"""How far an evaluation is."""

from trainer.monitoring.evaluation_progress import EvaluationProgress


def progress(seconds_each: float, forwards: int) -> tuple[list[str], int]:
    now, lines, beats = [100.0], [], []
    read = EvaluationProgress("context 64", forwards, lines.append, lambda: beats.append(0), lambda: now[0])
    for _ in range(forwards):
        now[0] += seconds_each
        read()
    return lines, len(beats)


def test_a_long_one_says_so_every_ten_seconds_but_not_at_its_end():
    assert progress(4.0, 9) == (
        ["context 64: 3 of 9 forwards (33 %) after 12s", "context 64: 6 of 9 forwards (66 %) after 24s"], 9
    )  # fmt: skip
    assert progress(700.0, 3)[0][0] == "context 64: 1 of 3 forwards (33 %) after 11m40s"


def test_a_short_one_says_nothing():
    assert progress(0.9, 11) == ([], 11)
