"""docs/extending.md: each diff applies, is as small as it should be, and trains in a copy of the tree under every engine.

Slow, four minutes: `pytest tests/test_extending.py -m slow`.
"""

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from shutil import copy, copytree, ignore_patterns
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from data.corpus.stream import Stream
from launch.config import RunConfig
from launch.inputs import batch_shape
from tests.addition import LAYOUTS, MIDDLE, SMALL, STEPS
from tests.combinations import corpus, network
from tests.combinations.run import Place, configuration
from tests.combinations.weights import initial_weights, kind

ROOT = Path(__file__).parent.parent
COPIED = ("model", "trainer", "launch", "data", "tests")
SECONDS = 100
CLOSE = 1e-5
"""Relative difference of losses in float32 between layouts."""


@dataclass(frozen=True)
class Addition:
    """A section of the page."""

    diff: str
    commands: list[list[str]]
    """Words of each line that calls tiglon, without the first."""

    @property
    def overrides(self) -> list[str]:
        """What the section sets to train with the addition."""
        return [word for word in self.commands[0] if "=" in word and not word.startswith("run.dir=")]

    @property
    def run(self) -> str:
        """Where it trains."""
        return next(word.removeprefix("run.dir=") for word in self.commands[0] if word.startswith("run.dir="))


def page() -> dict[str, Addition]:
    """Sections with a diff, by their titles."""
    found = {}
    for section in re.split(r"^## ", (ROOT / "docs/extending.md").read_text(), flags=re.MULTILINE)[1:]:
        diffs = re.findall(r"^```diff\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
        commands = [line.split() for line in re.findall(r"^    tiglon (.*)", section, re.MULTILINE)]
        found |= {section.partition("\n")[0]: Addition(diff, commands) for diff in diffs}
    return found


ADDITIONS = page()
TRACKER = "A tracker"
NEW_AND_CHANGED = {
    "An optimizer": (["trainer/optimizers/rowwise.py"], {"trainer/optimizers/config.py": 2}),
    "An attention": (["model/attention/gated.py"], {"model/config.py": 7}),
    "A feed-forward layer": (
        ["model/feed_forward/squared_relu.py", "model/huggingface/arcee.py"],
        {"model/config.py": 3, "model/huggingface/families.py": 2},
    ),
    "A position map": (["model/positions/maps/partial_rope.py"], {"model/positions/config.py": 5}),
    TRACKER: (["trainer/monitoring/trackio.py"], {"trainer/monitoring/config.py": 3, "pyproject.toml": 1}),
}
"""By section: the new files, and the lines added to and removed from others."""


def apply(diff: str, tree: Path, *options: str) -> str:
    """Apply a diff to a tree, or what `git apply` says of it."""
    done = subprocess.run(["git", "apply", *options], input=diff, cwd=tree, capture_output=True, text=True, timeout=60)
    assert not done.returncode, f"make the diff again, the code has moved: {done.stderr}"
    return done.stdout


def test_the_page_has_these_sections():
    assert list(ADDITIONS) == list(NEW_AND_CHANGED)


@pytest.mark.parametrize("title", ADDITIONS)
def test_a_diff_applies_and_is_a_new_file_and_a_few_lines(title: str):
    diff, (new, changed) = ADDITIONS[title].diff, NEW_AND_CHANGED[title]
    apply(diff, ROOT, "--check")
    counted = [line.split("\t") for line in apply(diff, ROOT, "--numstat").splitlines()]
    lines = {path: int(added) + int(removed) for added, removed, path in counted}
    assert [line.split() for line in apply(diff, ROOT, "--summary").splitlines()] == [
        ["create", "mode", "100644", path] for path in new
    ]
    assert all(lines.pop(path) < 80 for path in new) and lines == changed


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    corpus.make(folder)
    return folder


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the source."""
    for package in COPIED:
        copytree(ROOT / package, tmp_path / "copy" / package, ignore=ignore_patterns("__pycache__"))
    for name in ("tiglon.py", "pyproject.toml"):
        copy(ROOT / name, tmp_path / "copy")
    return tmp_path / "copy"


def python(tree: Path, *arguments: str) -> str:
    """What `python ARGUMENTS` prints in a tree, from a process group of which nothing is left."""
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=tree, env={**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        screen, errors = process.communicate(timeout=SECONDS)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not process.returncode, f"{screen}{errors}"
    return screen


Losses = dict[int, float]


def trained(tree: Path, shards: Path, overrides: list[str]) -> Losses:
    """Losses in a tree, the same under every layout; those of a resumed run have the same bits."""
    asked = {"corpus": str(shards), "runs": str(tree / "runs"), "overrides": overrides}
    found = json.loads(python(tree, "-m", "tests.addition", json.dumps(asked)).splitlines()[-1])
    assert list(found) == list(LAYOUTS)
    one = {int(step): loss for step, loss in found["ZeRO 1"]["whole"].items()}
    for runs in found.values():
        whole = {int(step): loss for step, loss in runs["whole"].items()}
        assert whole == pytest.approx(one, rel=CLOSE) and len(whole) == STEPS
        assert {int(step): loss for step, loss in runs["resumed"].items()} == {s: whole[s] for s in whole if s > MIDDLE}
    return one


def run_commands(tree: Path, addition: Addition) -> list[str]:
    """Screens of the section's commands after the first, of the run that was trained."""
    words = (["runs/whole-0" if word == addition.run else word for word in line] for line in addition.commands[1:])
    return [python(tree, "-m", "launch", *line) for line in words]


@pytest.mark.slow
@pytest.mark.timeout(4 * SECONDS)
@pytest.mark.parametrize("title", [title for title in ADDITIONS if title != TRACKER])
def test_it_trains_resumes_and_is_planned_and_evaluated(title: str, tree: Path, shards: Path):
    addition = ADDITIONS[title]
    apply(addition.diff, tree)
    losses = trained(tree, shards, addition.overrides)
    plan, *_ = run_commands(tree, addition)
    assert "A step as configured" in plan and "cannot run" not in plan
    wanted = OWN_REFERENCE.get(title)
    if wanted is not None:
        wanted(losses, tree, shards)


@pytest.mark.slow
def test_the_tracker_gets_the_run_and_its_resume(tree: Path, shards: Path, monkeypatch: pytest.MonkeyPatch):
    """As the tracker's own program reads it back."""
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tree / "trackio"))
    apply(ADDITIONS[TRACKER].diff, tree)
    script = """
import json, sys
from pathlib import Path
from tests.addition import SMALL, losses
from tests.combinations.run import Place
place = Place(Path(sys.argv[1]), "", Path("runs").absolute())
overrides = [*SMALL, *sys.argv[2:]]
losses(place, [*overrides, "train.steps=2"], "tracked")
print(json.dumps(losses(place, [*overrides, "train.steps=4"], "tracked")))
"""
    screen = python(tree, "-c", script, str(shards), *ADDITIONS[TRACKER].overrides)
    recorded = {int(step): loss for step, loss in json.loads(screen.splitlines()[-1]).items()}
    run = (tree / "runs/tracked/trackio-run.txt").read_text().strip()
    told = ["get", "metric", "--project", "cub", "--run", run, "--metric", "train/loss", "--json"]
    read = subprocess.check_output([Path(sys.executable).with_name("trackio"), *told], text=True, timeout=60)
    assert {value["step"]: value["value"] for value in json.loads(read)["values"]} == recorded
    assert list(recorded) == [1, 2, 3, 4]


def reference_configuration(tree: Path, shards: Path) -> RunConfig:
    """What is trained, without the addition."""
    return configuration(Place(shards, "", tree / "runs").fill(list(SMALL), "reference"))


def first_batches(config: RunConfig, steps: int) -> list[list[network.Batch]]:
    """The micro-batches of each update, over all ranks."""
    data = config.data.model_copy(update={"prefetch_steps": 0})
    stream = Stream(data, "train", batch_shape(config.train), 0, 1, config.run.seed)
    found = [[(one.inputs_BS, one.targets_BS, one.cu_seqlens) for one in stream.batches(step)] for step in range(steps)]
    stream.close()
    return found


def rowwise(losses: Losses, tree: Path, shards: Path) -> None:
    """The optimizer on whole tensors in float64, by its formulas."""
    config = reference_configuration(tree, shards)
    weights = {name: weight.double() for name, weight in initial_weights(config).items()}
    m, v = ({name: torch.zeros((), dtype=torch.float64) for name in weights} for _ in range(2))
    wanted = {}
    for step, batches in enumerate(first_batches(config, STEPS), 1):
        wanted[step], found = network.gradients(config, weights, batches)
        for name, p in weights.items():
            m[name] = 0.9 * m[name] + 0.1 * found[name]
            v[name] = 0.95 * v[name] + 0.05 * m[name].square().mean(-1, keepdim=True)
            u = m[name] / (1 - 0.9**step) / ((v[name] / (1 - 0.95**step)).sqrt() + 1e-8)
            weights[name] = p - 1e-3 * (u + (0.0 if kind(name) in ("gain", "bias") else 0.1) * p)
    assert losses == pytest.approx(wanted, rel=CLOSE)


def as_transformers(losses: Losses, tree: Path, shards: Path) -> None:
    """The logits of the exported network are those of the run, and those of the network that is imported from it."""
    script = """
import tiglon, torch, transformers
ours, theirs = tiglon.load("runs/whole-0"), transformers.AutoModelForCausalLM.from_pretrained("runs/exported")
again = tiglon.load("runs/imported", dtype=torch.float32)
ids = torch.arange(60).view(2, 30)
with torch.no_grad():
    assert type(theirs).__name__ == "ArceeForCausalLM"
    torch.testing.assert_close(ours.logits(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again.logits(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)
    theirs.model.layers[0].mlp.act_fn = torch.nn.SiLU()
    assert (ours.logits(ids) - theirs(ids).logits).abs().max() > 1e-2
"""
    python(tree, "-c", script)


def refused(losses: Losses, tree: Path, shards: Path) -> None:
    """An attention that no stock architecture has is not exported."""
    with pytest.raises(AssertionError, match="attention = 'gated' has no stock architecture here; those that have: gqa, mla"):
        python(tree, "-m", "launch", "export", "runs/whole-0", "--output", "runs/exported")


def half_rotated(losses: Losses, tree: Path, shards: Path) -> None:
    """The first loss is that of the reference network with RoPE, the lower half of whose frequencies are zero."""
    full = network.frequencies

    def upper_half(*arguments: Any) -> Tensor:
        found = full(*arguments)
        return torch.where(torch.arange(len(found)) < len(found) // 2, found, 0.0)

    config = reference_configuration(tree, shards)
    weights = {name: weight.double() for name, weight in initial_weights(config).items()}
    rotated, _ = network.gradients(config, weights, first_batches(config, 1)[0])
    with patch.object(network, "frequencies", upper_half):
        wanted, _ = network.gradients(config, weights, first_batches(config, 1)[0])
    assert losses[1] == pytest.approx(wanted, rel=CLOSE) and rotated != pytest.approx(wanted, rel=CLOSE)


OWN_REFERENCE = {
    "An optimizer": rowwise, "An attention": refused, "A feed-forward layer": as_transformers, "A position map": half_rotated,
}  # fmt: skip
"""What else is compared."""
