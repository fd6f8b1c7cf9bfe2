"""Fifty SIGKILLs: a two-rank run with asynchronous saves, killed at random moments, many inside a save. Writes a page.

python -m benchmarks.crash [--kills 50] [--seed 0] [--steps 800] [--output docs/results/checkpoint_crash.md]
"""

import argparse
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.launch.crash import EVERY_STEPS, Outcome, assert_same, disturb, finish, make_run


def page(outcome: Outcome, options: argparse.Namespace, seconds: float) -> str:
    """The results as Markdown."""
    counts = Counter(death[0] for death in outcome.deaths)
    who = Counter(death[1] for death in outcome.deaths)
    return "\n".join(
        [
            "# Crash test",
            "",
            f"    python -m benchmarks.crash --kills {options.kills} --seed {options.seed} --steps {options.steps}",
            "",
            f"Two ranks, {options.steps} steps, an asynchronous save every {EVERY_STEPS}; {len(outcome.deaths)} SIGKILLs "
            f"({', '.join(f'{count} aimed {name}' for name, count in counts.items())};",
            f"{', '.join(f'{name}: {count}' for name, count in who.items())}).",
            f"{outcome.inside_a_save} of them left a half-written save behind.",
            f"The last death came at step {outcome.deaths[-1][3]}. After each, every visible checkpoint was read and intact.",
            "",
            "After the last restart the run's metrics (loss, gradient norm and rate of every step, evaluations) and its",
            f"final weights and states were equal, bit for bit, to those of an undisturbed run. {seconds:.0f} s in all.",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--output", type=Path, default=Path("docs/results/checkpoint_crash.md"))
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        configuration = make_run(folder, options.steps)
        finish(configuration, f"run.dir={folder}/whole")
        print(f"undisturbed run done after {time.monotonic() - began:.0f} s", flush=True)
        outcome = disturb(configuration, folder / "killed", options.kills, options.seed)
        assert_same(folder / "whole", folder / "killed")
    assert outcome.deaths[-1][3] < options.steps, "the run ended before all its deaths: raise --steps"
    text = page(outcome, options, time.monotonic() - began)
    print(text)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(text)


if __name__ == "__main__":
    main()
