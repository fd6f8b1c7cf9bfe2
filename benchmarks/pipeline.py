"""The bubble of a pipeline: how long its ranks wait for each other in an update, beside the formula.

    python -m benchmarks.pipeline [--out docs/results] [--sleep 120] [--rounds 5]

Real ranks (gloo, one thread each) train a real network through the engine (ZeRO 1, float32), and note when every forward and
backward begins and ends; time.monotonic is one clock for all processes of a machine. The bubble is what is left of (first
forward to last backward) x ranks without the passes: (p - 1) / (v n + p - 1) for p ranks with v stages each, n micro-batches
and passes of equal length (Narayanan et al. 2021, https://arxiv.org/abs/2104.04473, section 2.2).

Ranks that compute need a core each. So every case is measured with passes that last a fixed time: a rank computes a small
network and then sleeps until the forward of its layers has lasted a third, and the backward two thirds, of `--sleep`
milliseconds. Schedule, messages and engine are those of any run. Where each rank can have a core, a larger network that does
not sleep is measured as well. How well its stages are balanced is told by the processor time of each rank's passes, which
other processes on the core hardly change.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
from torch import Tensor

from launch.config import RunConfig
from launch.engine import build_engine
from launch.load_config import build_config
from launch.resolve import resolve
from model.decoder import Decoder
from model.parallel.mesh import make_mesh
from tests.ranks import run_ranks
from trainer.engines.base import StepHooks

LAYERS, VOCABULARY = 8, 256
COMPUTED, SLEEPING = {"hidden_size": 512, "intermediate_size": 1408}, {"hidden_size": 32, "intermediate_size": 64}
LENGTH = {"computed": 256, "sleeping": 16}
STAGES = {"1f1b": 1, "interleaved": 2}
"""Of a rank, by schedule."""
NOTES = (
    "The median of the updates, in brackets their least and most. What is above the formula is messages, and passes that are",
    "not equally long. A pass that computes counts as long as it lasts, with the time in which another process has its core.",
)


@dataclass(frozen=True)
class Case:
    """One pipeline; without `sleep` (milliseconds of a forward and a backward of a rank's layers) a rank computes."""

    ranks: int
    micro_batches: int
    schedule: str
    sleep: float = 0.0

    def bubble(self) -> float:
        """By the formula."""
        return (self.ranks - 1) / (STAGES[self.schedule] * self.micro_batches + self.ranks - 1)

    def config(self) -> RunConfig:
        """Of a network of LAYERS blocks."""
        length = LENGTH["sleeping" if self.sleep else "computed"]
        heads = {"num_attention_heads": 8, "num_key_value_heads": 4} if not self.sleep else {"num_attention_heads": 4}
        sizes = {"vocab_size": VOCABULARY, "num_hidden_layers": LAYERS, **(SLEEPING if self.sleep else COMPUTED), **heads}
        train = {"precision": "fp32", "sequence_length": length, "micro_batch_size": 1, "global_batch_size": self.micro_batches}
        parallel = {"pipeline_parallel_size": self.ranks, "pipeline_schedule": self.schedule, "zero_stage": 1}
        return build_config({"model": sizes, "train": train, "optimizer": {"name": "adamw"}, "parallel": parallel})


@dataclass
class Pass:
    """A forward or a backward of a micro-batch through a stage."""

    kind: str
    stage: int
    micro_batch: int
    begin: float
    end: float
    cpu: float
    """Seconds of processor time."""


@dataclass
class Clock:
    """Notes the passes of this rank, from the marks of the engine and from the stage that runs.

    Args:
        seconds: how long a pass lasts at least, by its kind.
    """

    seconds: dict[str, float]
    passes: list[Pass] = field(default_factory=list)
    stage: int = -1
    since: tuple[float, float] = (0.0, 0.0)

    def mark(self, part: str) -> None:
        """StepHooks.mark: "pipeline" before every pass, and its kind after it."""
        if part == "pipeline":
            self.since = (time.monotonic(), time.thread_time())
            return
        begin, cpu = self.since
        cpu = time.thread_time() - cpu
        time.sleep(max(0.0, begin + self.seconds[part] - time.monotonic()))
        before = sum(one.kind == part and one.stage == self.stage for one in self.passes)
        self.passes.append(Pass(part, self.stage, before, begin, time.monotonic(), cpu))

    def watch(self, model: Decoder) -> None:
        """Learn which stage a pass is of. Micro-batches go through each in their order."""
        run_stage: Callable[..., Tensor] = model.run_stage

        def run(stage: int, *arguments: Any) -> Tensor:
            self.stage = stage
            x_TD = run_stage(stage, *arguments)
            x_TD.register_hook(lambda gradient: setattr(self, "stage", stage))
            return x_TD

        model.run_stage = run  # type: ignore[method-assign]


def measure(rank: int, world_size: int, cases: list[Case], rounds: int) -> list[list[list[Pass]]]:
    """The passes of this rank, by case and round; the first update of a case is not counted."""
    return [_measure(case, rounds) for case in cases]


def _measure(case: Case, rounds: int) -> list[list[Pass]]:
    config, share = case.config(), case.sleep / 1000 / STAGES[case.schedule]
    clock = Clock({"forward": share / 3, "backward": share * 2 / 3})
    mesh = make_mesh(1, torch.device("cpu"), pipeline_parallel_size=case.ranks)
    engine = build_engine(resolve(config, case.ranks, mesh.device), mesh, StepHooks(mark=clock.mark))
    clock.watch(engine.model)
    tokens = torch.randint(VOCABULARY, (case.micro_batches, config.train.sequence_length + 1))
    batches: list[Any] = [
        SimpleNamespace(inputs_BS=row[None, :-1], targets_BS=row[None, 1:], cu_seqlens=None) for row in tokens
    ]
    found = []
    for _ in range(rounds + 1):
        clock.passes = []
        dist.barrier()
        engine.accumulate(batches)
        found.append(clock.passes)
        engine.update(1e-4)
    engine.close()
    return found[1:]


def idle_share(ranks: list[list[Pass]]) -> float:
    """Of the time between the first forward and the last backward, how much the ranks are in no pass."""
    every = [one for passes in ranks for one in passes]
    whole = max(one.end for one in every) - min(one.begin for one in every)
    return 1 - sum(one.end - one.begin for one in every) / whole / len(ranks)


def result(case: Case, answers: list[list[list[Pass]]]) -> dict[str, Any]:
    """Of the rounds of a case: the bubbles, the round of the median one, and processor time."""
    rounds = [[rank[index] for rank in answers] for index in range(len(answers[0]))]
    bubbles = [idle_share(ranks) for ranks in rounds]
    median = statistics.median_low(bubbles)
    cpu = {
        kind: [1000 * sum(p.cpu for p in _of(kind, r)) / len(r) / case.micro_batches for r in answers]
        for kind in ("forward", "backward")
    }
    passes = [[asdict(one) for one in rank] for rank in rounds[bubbles.index(median)]]
    return {**asdict(case), "formula": case.bubble(), "bubble": median, "bubbles": bubbles, "cpu_ms": cpu, "passes": passes}


def _of(kind: str, rounds: list[list[Pass]]) -> list[Pass]:
    return [one for passes in rounds for one in passes if one.kind == kind]


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """A timeline of each: one row per rank, forwards and backwards with the number of their micro-batch."""
    figure, axes = plt.subplots(len(results), 1, figsize=(11, 2.3 * len(results)), sharex=True, squeeze=False)
    for axis, found in zip(axes[:, 0], results, strict=True):
        first = min(one["begin"] for rank in found["passes"] for one in rank)
        for rank, passes in enumerate(found["passes"]):
            for one in passes:
                begin, width = 1000 * (one["begin"] - first), 1000 * (one["end"] - one["begin"])
                second = one["stage"] >= found["ranks"]
                colour = {"forward": ("#9ecae1", "#4292c6"), "backward": ("#fdc086", "#e6842a")}[one["kind"]][second]
                axis.barh(rank, width, left=begin, height=0.82, color=colour, edgecolor="white", linewidth=0.5)
                axis.text(begin + width / 2, rank, str(one["micro_batch"] + 1), ha="center", va="center", fontsize=7)
        axis.set_yticks(range(found["ranks"]), [f"rank {rank}" for rank in range(found["ranks"])])
        axis.invert_yaxis()
        stages = STAGES[found["schedule"]]
        axis.set_title(
            f"{found['schedule']}, {stages} stage{'s' if stages > 1 else ''} per rank: bubble {found['bubble']:.1%}, "
            f"by the formula {found['formula']:.1%}", fontsize=9, loc="left",
        )  # fmt: skip
    axes[-1, 0].set_xlabel(
        "milliseconds (blue: forward, orange: backward, with the number of the micro-batch; dark: second stage)"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def page(results: list[dict[str, Any]], about: str) -> str:
    """pipeline.md."""
    lines = ["# The bubble of a pipeline", "", about, "", "![timelines of both schedules](pipeline.png)", ""]
    lines += ["| ranks | micro-batches | schedule | formula | passes of a fixed time | passes that compute |"]
    lines += ["|---|---|---|---|---|---|"]
    measured = {(one["ranks"], one["micro_batches"], one["schedule"], bool(one["sleep"])): one for one in results}
    for one in (one for one in results if one["sleep"]):
        size, computed = (one["ranks"], one["micro_batches"], one["schedule"]), "-"
        if (*size, False) in measured and size[0] <= (os.cpu_count() or 1):
            computed = _range(measured[*size, False])
        lines.append(f"| {size[0]} | {size[1]} | {size[2]} | {one['formula']:.1%} | {_range(one)} | {computed} |")
    lines += ["", *NOTES, "", "## Processor time of a micro-batch through a rank's layers, ms", ""]
    lines += ["| ranks | schedule | forward, by rank | backward, by rank |", "|---|---|---|---|"]
    for one in (one for one in results if not one["sleep"] and one["micro_batches"] == 8):
        times = [", ".join(f"{ms:.1f}" for ms in one["cpu_ms"][kind]) for kind in ("forward", "backward")]
        lines.append(f"| {one['ranks']} | {one['schedule']} | {times[0]} | {times[1]} |")
    return "\n".join(lines) + "\n"


def _range(found: dict[str, Any]) -> str:
    return f"{found['bubble']:.1%} ({min(found['bubbles']):.1%} to {max(found['bubbles']):.1%})"


def run(cases: list[Case], rounds: int) -> list[dict[str, Any]]:
    """Measure cases, those of as many ranks in the same processes."""
    found = []
    for ranks in sorted({case.ranks for case in cases}):
        chosen = [case for case in cases if case.ranks == ranks]
        answers = run_ranks(measure, ranks, chosen, rounds, timeout_seconds=600)
        for index, case in enumerate(chosen):
            found.append(result(case, [rank[index] for rank in answers]))
            print(case, f"bubble {found[-1]['bubble']:.1%}, by the formula {case.bubble():.1%}", flush=True)
    return found


def main() -> None:
    """Measure, and write pipeline.md, pipeline.json and pipeline.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--sleep", type=float, default=120.0, help="ms of a forward and a backward of a rank's layers")
    parser.add_argument("--rounds", type=int, default=5, help="updates of each case")
    given = parser.parse_args()
    sizes = [(ranks, count, kind) for ranks in (2, 4) for count in (4, 8, 16) for kind in STAGES]
    cases = [Case(*size, given.sleep) for size in sizes]
    cores = os.cpu_count() or 1
    cases += [Case(*size) for size in sizes if size[0] <= cores or size[1] == 8]
    results = run(cases, given.rounds)
    about = (
        f"`python -m benchmarks.pipeline`: {LAYERS} blocks, ZeRO 1, float32, gloo, one thread a rank, {cores} CPU cores, torch "
        f"{torch.__version__}, {given.rounds} updates. Passes of a fixed time: a forward through the layers of a rank "
        f"lasts {given.sleep / 3:.0f} ms and a backward {given.sleep * 2 / 3:.0f}, half of it a stage where a rank has two. "
        f"Passes that compute: {COMPUTED['hidden_size']} wide, {LENGTH['computed']} tokens, only where every rank can have "
        "a core. The picture is of 4 ranks and 8 micro-batches, with passes of a fixed time."
    )
    given.out.mkdir(parents=True, exist_ok=True)
    draw(
        [one for one in results if one["sleep"] and (one["ranks"], one["micro_batches"]) == (4, 8)], given.out / "pipeline.png"
    )
    kept = [{key: value for key, value in one.items() if key != "passes"} for one in results]
    (given.out / "pipeline.json").write_text(json.dumps({"about": about, "cases": kept}, indent=1) + "\n")
    (given.out / "pipeline.md").write_text(page(results, about))


if __name__ == "__main__":
    main()
