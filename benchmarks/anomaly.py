"""The embedding anomaly (Su 2023, kexue.fm/archives/9736) in small, and what cures it: rare rows under Tiger, Lion and AdamW.

    python -m benchmarks.anomaly [--steps 6000] [--output docs/results]

A bigram language model over 400 tokens with Zipf frequencies: most tokens are absent from most steps. Under a sign
optimizer a row keeps moving after its token has gone, towards 1 / weight_decay. Writes embedding_anomaly.md and .png.
"""

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from model.parallel.mesh import Mesh
from model.parameters import ParameterSpec, set_spec
from trainer.optimizers.config import OptimizerConfig
from trainer.optimizers.fragments import whole_fragments
from trainer.optimizers.rates import UpdateStep
from trainer.optimizers.step import Optimizer, seen_rows

VOCABULARY, WIDTH, TOKENS, RARE = 400, 32, 64, 40
SIGMA = 0.02
"""Deviation of the initial weights."""
DECAY = 0.1
LIMIT = 1 / DECAY
SEEN, ADAMW = {"embedding": {"rows": "seen"}}, {"embedding": {"rule": "adamw", "weight_decay": 0.0}}
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "Tiger": ({"name": "tiger", "learning_rate": 2e-3}, "untied"),
    "Tiger, RMS by row": ({"name": "tiger", "learning_rate": 2e-3, "embedding_rms": "row"}, "untied"),
    "Lion": ({"name": "lion", "learning_rate": 1e-3}, "untied"),
    "AdamW": ({"name": "adamw", "learning_rate": 2e-3}, "untied"),
    "Tiger, RMS by row, lazy": (
        {"name": "tiger", "learning_rate": 2e-3, "embedding_rms": "row", "rules": SEEN},
        "untied",
    ),
    "Lion, lazy": ({"name": "lion", "learning_rate": 1e-3, "rules": SEEN}, "untied"),
    "Tiger, AdamW for the embedding": ({"name": "tiger", "learning_rate": 2e-3, "rules": ADAMW}, "untied"),
    "Lion, AdamW for the embedding": ({"name": "lion", "learning_rate": 1e-3, "rules": ADAMW}, "untied"),
    "Tiger, tied with half-swap": ({"name": "tiger", "learning_rate": 2e-3}, "half-swap"),
}


class Bigram(nn.Module):
    """logits = head tanh(W x): what can be learnt is the next token given this one."""

    def __init__(self, head: str, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator) * SIGMA)

        self.swap = head == "half-swap"
        self.embed, self.matrix = draw(VOCABULARY, WIDTH), draw(WIDTH, WIDTH)
        self.head = self.embed if self.swap else draw(VOCABULARY, WIDTH)
        set_spec(self.embed, ParameterSpec("embedding", (VOCABULARY, WIDTH), None))
        set_spec(self.matrix, ParameterSpec("matrix", (WIDTH, WIDTH), None))
        if not self.swap:
            set_spec(self.head, ParameterSpec("matrix", (VOCABULARY, WIDTH), None))

    def forward(self, ids_T: Tensor) -> Tensor:
        """Mean loss of predicting each id from the one before."""
        x_TD = self.embed[ids_T[:-1]]
        h_TD = torch.nn.functional.rms_norm(x_TD + torch.tanh(x_TD @ self.matrix), (WIDTH,))
        if self.swap:
            h_TD = torch.cat(h_TD.chunk(2, dim=1)[::-1], dim=1)
        return cross_entropy(h_TD @ self.head.t(), ids_T[1:])


def text(steps: int, seed: int) -> Tensor:
    """steps x (TOKENS + 1) ids: half of the time a fixed successor follows, else a token drawn by Zipf's law (exponent 1.5)."""
    generator = torch.Generator().manual_seed(seed)
    frequency = torch.arange(1, VOCABULARY + 1).float() ** -1.5
    ids = torch.multinomial(frequency, steps * (TOKENS + 1), replacement=True, generator=generator).view(steps, -1)
    follows = torch.rand(ids.shape, generator=generator) < 0.5
    for place in range(1, ids.shape[1]):
        ids[:, place] = torch.where(follows[:, place], ids[:, place - 1] // 2, ids[:, place])  # towards frequent tokens
    return ids


@dataclass
class Course:
    """What became of an embedding."""

    steps: list[int] = field(default_factory=list)
    largest: list[float] = field(default_factory=list)
    rare: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def train(chosen: dict[str, Any], head: str, steps: int, seed: int) -> Course:
    """A constant rate, as in the first half of a long run."""
    own = {key: value for key, value in chosen.items() if key not in ("name", "rules")} | {"weight_decay": DECAY}
    settings = OptimizerConfig(name=chosen["name"], max_grad_norm=0.0, rules=chosen.get("rules", {}), **{chosen["name"]: own})
    model, ids, course, alone = Bigram(head, seed), text(steps, seed), Course(), Mesh()
    fragments = whole_fragments(dict(model.named_parameters()), alone)
    weights = dict(model.named_parameters())
    moves = Optimizer(settings, fragments, alone, dict.fromkeys(weights, 0.1 * SIGMA), partitioned=False)
    for step in range(1, steps + 1):
        loss = model(ids[step - 1])
        gradients = torch.autograd.grad(loss, [weights[fragment.name] for fragment in fragments])
        for fragment, gradient in zip(fragments, gradients, strict=True):
            fragment.gradient = gradient.view(-1)
        seen = seen_rows([ids[step - 1, :-1]], VOCABULARY, alone)
        moves.update(UpdateStep(step, settings.rate, seen))
        course.losses.append(loss.item())
        if step % max(1, steps // 120) == 0:
            rows = model.embed.detach()
            course.steps.append(step)
            course.largest.append(rows.abs().max().item())
            course.rare.append(rows[-RARE:].square().mean().sqrt().item())
    return course


def picture(courses: dict[str, Course], path: Path) -> None:
    """Largest entry over the steps: without remedies on the left, with them on the right."""
    figure = Figure(figsize=(11, 4))
    panels = figure.subplots(1, 2, sharey=True)
    names = list(courses)
    for panel, part, title in ((panels[0], names[:4], "as it comes"), (panels[1], names[4:], "with a remedy")):
        for name in part:
            panel.plot(courses[name].steps, courses[name].largest, label=name)
        panel.axhline(LIMIT, color="black", linestyle=":", label="1 / weight_decay")
        panel.set(yscale="log", xlabel="step", title=title)
        panel.legend(fontsize=7)
    panels[0].set_ylabel("largest entry of the embedding")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


PAGE = """# Rare rows of an embedding under sign optimizers

`python -m benchmarks.anomaly --steps {steps}`: one CPU core, some minutes.

A token that stays away leaves its momentum behind. Tiger and Lion use only the sign of it, so the row keeps moving by a full
step each time, towards 1 / weight_decay (Su 2023, kexue.fm/archives/9736). Here: {vocabulary} tokens with Zipf frequencies
(exponent 1.5), {tokens} a step, constant rates, weight_decay = {decay}, so the end is at {limit:g}. *Rare* is the RMS of the
{rare} rarest rows, *loss* the mean of the last {tail} steps.

![largest entry of the embedding](embedding_anomaly.png)

| optimizer | largest entry, half way | largest entry, end | rare, end | loss |
|---|---|---|---|---|
{rows}

Lazy rows and AdamW for the embedding keep the rare rows where AdamW keeps them; what grows under *Lion, lazy* are rows that
are seen, and learnt. A tied head gives every row a gradient in every step, but in this toy it is no cure: the softmax pushes
an absent row in a constant direction too. It was one in the author's run (Su 2023, kexue.fm/archives/9736), with a rate that
decays.
"""


def page(courses: dict[str, Course], steps: int) -> str:
    """The table, with the command that makes it."""
    tail, rows = max(1, steps // 10), []
    for name, course in courses.items():
        half = course.largest[len(course.largest) // 2 - 1]
        loss = sum(course.losses[-tail:]) / tail
        rows.append(f"| {name} | {half:.2f} | {course.largest[-1]:.2f} | {course.rare[-1]:.3f} | {loss:.3f} |")
    return PAGE.format(
        steps=steps, vocabulary=VOCABULARY, tokens=TOKENS, decay=DECAY, limit=LIMIT, rare=RARE, tail=tail, rows="\n".join(rows)
    )  # fmt: skip


def main() -> None:
    """Run every case and write page and picture."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--steps", type=int, default=6000)
    arguments.add_argument("--output", type=Path, default=Path("docs/results"))
    given = arguments.parse_args()
    torch.set_num_threads(1)
    courses = {}
    for name, (chosen, head) in CASES.items():
        courses[name] = train(chosen, head, given.steps, seed=0)
        print(f"{name}: largest {courses[name].largest[-1]:.3f}, rare {courses[name].rare[-1]:.3f}", flush=True)
    given.output.mkdir(parents=True, exist_ok=True)
    picture(courses, given.output / "embedding_anomaly.png")
    (given.output / "embedding_anomaly.md").write_text(page(courses, given.steps))


if __name__ == "__main__":
    main()
