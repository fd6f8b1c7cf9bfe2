"""A hundred endings: runs ended at random moments in every way that a run can end, and resumed. Writes a page.

python -m benchmarks.endings [--endings 100] [--seed 0] [--only KIND] [--output docs/results/endings.md]
"""

import argparse
import tempfile
import textwrap
import time
from collections import Counter
from pathlib import Path

from tests.launch.endings import KEEP, KINDS, LEFT_SECONDS, LOOK_EVERY, SAVE_EVERY, STEPS, Endings, Outcome, plan

WIDTH = 128
COLUMNS = (
    "ended by",
    "how many",
    "starting, training, leaving",
    "statuses",
    "resumed from a checkpoint, from step 0",
    "steps done again, at most",
)


def page(outcomes: list[Outcome], compared: int, options: argparse.Namespace, seconds: float) -> str:
    """The results as Markdown."""
    ended = [outcome for outcome in outcomes if outcome.kind]
    wrong = [outcome for outcome in outcomes if outcome.faults]
    only = f" --only {options.only}" if options.only else ""
    how = (
        f"Runs of {STEPS} steps started with `python -m launch train`, on one and two ranks, with zero and fold, an "
        f"asynchronous save every {SAVE_EVERY} steps ({KEEP} kept), an evaluation and a sample every {LOOK_EVERY}, TensorBoard "
        f"on. {len(ended)} of {len(outcomes)} starts were ended, each at a moment drawn from the whole life of the command, a "
        "quarter of them before its first step; then the same command was given again, until it ended with status 0. (A status "
        "below 0 is the signal that Python died of before it had come to this project's code; a shell shows 128 + its number.)"
    )
    what = (
        f"{compared} runs came to their end and were compared with unbroken ones: every train and evaluate record and every "
        "sample of metrics.jsonl, with all digits; TensorBoard's curves, step by step, with metrics.jsonl; every tensor of the "
        "last checkpoint, bit for bit. Checked after every end: the status is that of the way it ended; a failure has a "
        "sentence and no screen a traceback; every visible checkpoint is whole, and every one is there that the screen said to "
        "be; the next start resumed from what was promised or from later; no process was left behind after "
        f"{LEFT_SECONDS} s."
    )
    table = [_row(kind, [outcome for outcome in ended if outcome.kind == kind]) for kind in KINDS]
    return "\n".join(
        [
            "# Endings",
            "",
            f"    python -m benchmarks.endings --endings {options.endings} --seed {options.seed}{only}",
            "",
            textwrap.fill(how, WIDTH),
            "",
            f"| {' | '.join(COLUMNS)} |",
            f"|{'---|' * len(COLUMNS)}",
            *table,
            "",
            textwrap.fill(what, WIDTH),
            "",
            *(_faults(wrong) or ["Nothing was amiss."]),
            "",
            f"{seconds:.0f} s in all.",
            "",
        ]
    )


def _row(kind: str, found: list[Outcome]) -> str:
    when = Counter(outcome.when for outcome in found)
    statuses = Counter(outcome.status for outcome in found)
    unfinished = [outcome for outcome in found if outcome.status != 0]
    resumed = [outcome for outcome in unfinished if outcome.resumed is not None]
    again = [
        outcome.reached - outcome.resumed for outcome in resumed if outcome.reached is not None and outcome.resumed is not None
    ]
    cells = [
        kind,
        str(len(found)),
        ", ".join(str(when[name]) for name in ("starting", "training", "leaving")),
        ", ".join(f"{status} ({count})" for status, count in sorted(statuses.items())),
        f"{len(resumed)}, {len(unfinished) - len(resumed)}",
        str(max(0, *again)) if again else "",
    ]
    return f"| {' | '.join(cells)} |"


def _faults(wrong: list[Outcome]) -> list[str]:
    lines = [f"Amiss after {len(wrong)} of them:", ""] if wrong else []
    for outcome in wrong:
        what = (
            f"{outcome.kind or 'let finish'}, {outcome.ranks} ranks, {outcome.engine}, {outcome.when}, status {outcome.status}"
        )
        lines += [f"- {what}: {'; '.join(outcome.faults)}"]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--endings", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", choices=("", *KINDS), metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--output", type=Path, default=Path("docs/results/endings.md"))
    options = parser.parse_args()
    began = time.monotonic()
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as name:
        endings = Endings(Path(name), lambda line: print(f"{time.monotonic() - began:6.0f} s  {line}", flush=True))
        for number, chain in enumerate(plan(options.endings, options.seed, options.only)):
            found = endings.chain(chain, number)
            outcomes += found
            for outcome in found:
                if outcome.faults:
                    print("\n".join([f"screen of {outcome.kind or 'let finish'}:", *outcome.screen[-12:], ""]), flush=True)
    text = page(outcomes, endings.compared, options, time.monotonic() - began)
    print(text)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(text)
    raise SystemExit(1 if any(outcome.faults for outcome in outcomes) else 0)


if __name__ == "__main__":
    main()
