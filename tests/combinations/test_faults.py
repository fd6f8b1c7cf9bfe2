"""The combinations can fail: each patch of faults/ plants a fault in a copy of tiglon, and a configuration sees it.

Slow: `pytest tests/combinations/test_faults.py -m slow`. What is checked of every patch in each run is that it still applies
and that the array has a row with the values that show the fault.
"""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest

from tests.combinations import array, corpus
from tests.combinations.check import check
from tests.combinations.options import default
from tests.combinations.run import Place
from tests.object_store import served_bucket

ROOT = Path(__file__).parent.parent.parent
PACKAGES = ("model", "trainer", "launch", "data", "tests")
PATCHES = {path.stem: path for path in sorted((Path(__file__).parent / "faults").glob("*.patch"))}
SECONDS = 400


@dataclass(frozen=True)
class Seen:
    """What shows a fault."""

    values: dict[str, str]
    """Of options, all others at their first value."""
    words: str
    """Part of what the check says."""


UNTIED_LAZY = {"embedding": "seen", "output head": "untied"}
EXPERTS = {"feed forward": "moe"}
RESUMED = "resumed from its middle"
SEEN = {
    "01-kept-product-reduced-twice": Seen({"tensor parallel": "2", "recompute": "selective"}, "gradient norm of step 1: off"),
    "02-targets-counted-per-rank": Seen({"data ranks": "2"}, "loss of step 1: off"),
    "03-gradient-sum-left-out": Seen({"tensor parallel": "2"}, "gradient norm of step 1: off"),
    "04-data-ranks-overlap": Seen({"data ranks": "2", "micro-batch": "2"}, "loss of step 1: off"),
    "05-stale-row-mask": Seen(UNTIED_LAZY, "final model.embed_tokens.weight: off"),
    "06-momenta-exchanged-by-a-resume": Seen({"optimizer": "tiger"}, RESUMED),
    "07-window-one-too-long": Seen({"windows": "all"}, "loss of step 1: off"),
    "08-clipped-by-own-norm": Seen(
        {"data ranks": "2", "clipping": "tight"}, "final model.layers.0.self_attn.k_proj.weight: off"
    ),
    "09-evaluation-leaves-its-map": Seen({"evaluation": "every-2", "evaluate with": "rerope"}, "loss of step 3: off"),
    "10-stale-weights-after-a-resume": Seen({"engine": "zero-3"}, RESUMED),
    "11-decay-of-gains": Seen({"weight decay": "large"}, "loss of step 4: off"),
    "12-bias-correction-one-step-ahead": Seen({"optimizer": "adamw"}, "loss of step 2: off"),
    "13-log-n-across-documents": Seen({"document mask": "on", "log n": "trained"}, "loss of step 1: off"),
    "14-backward-across-documents": Seen({"document mask": "on", "windows": "all"}, "gradient norm of step 1: off"),
    "15-gains-of-own-tokens": Seen({"tensor parallel": "2-sequence"}, "gradient norm of step 1: off"),
    "16-tokens-scored-twice": Seen({"contexts": "short"}, "held-out loss in context 64 of step 4: off"),
    "17-schedule-late-after-a-resume": Seen({"schedule": "cosine"}, RESUMED),
    "18-step-count-lost-by-a-resume": Seen({"optimizer": "adamw"}, RESUMED),
    "19-momentum-decays-per-micro-batch": Seen({"engine": "fold"}, "gradient norm of step 2: off"),
    "20-rounding-repeats-after-a-resume": Seen({"engine": "fold", "precision": "bf16"}, RESUMED),
    "21-rows-seen-by-one-rank": Seen({"data ranks": "2", **UNTIED_LAZY}, "final model.embed_tokens.weight: off"),
    "22-rms-of-own-part": Seen({"data ranks": "2", "optimizer": "tiger"}, "loss of step 2: off"),
    "23-stale-copies-of-hpz": Seen({"engine": "zero-3-hpz", "data ranks": "2"}, RESUMED),
    "24-targets-counted-that-are-not-scored": Seen({"corpora": "curriculum"}, "loss of step 1: off"),
    "25-row-bias-of-own-tokens": Seen(
        {"tensor parallel": "2-sequence", "attention bias": "all"}, "gradient norm of step 1: off"
    ),
    "26-mean-square-of-own-heads": Seen({"tensor parallel": "2", "qk norm": "rms-all-heads"}, "loss of step 1: off"),
    "27-scale-of-own-slice": Seen({"tensor parallel": "2", "optimizer": "muon"}, "loss of step 2: off"),
    "28-slices-in-one-place": Seen({"tensor parallel": "2", "optimizer": "muon"}, "loss of step 2: off"),
    "29-columns-joined-as-rows": Seen({"tensor parallel": "2", "optimizer": "muon"}, "loss of step 2: off"),
    "30-largest-logit-of-own-tokens": Seen({"qk clip": "on", "data ranks": "2"}, "bound of logits of step 1: off"),
    "31-rotated-query-by-the-root": Seen({"qk clip": "on", "heads": "mla"}, "bound of logits of step 2: off"),
    "32-boundary-of-a-fixed-count": Seen({"batch ramp": "doubling"}, "gradient norm of step 1: off"),
    "33-positions-of-own-tokens": Seen({"context parallel": "2"}, "loss of step 1: off"),
    "34-gradients-of-own-queries": Seen({"context parallel": "2"}, "gradient norm of step 1: off"),
    "35-targets-counted-by-every-context-rank": Seen({"context parallel": "2"}, "loss of step 1: off"),
    "36-keys-beyond-the-chunk": Seen({"context parallel": "2", "position": "rerope"}, "loss of step 1: off"),
    "37-late-chunks-in-order-of-ranks": Seen({"context parallel": "2-heads"}, "loss of step 1: off"),
    "38-held-out-loss-of-own-tokens": Seen({"context parallel": "2"}, "held-out loss of step 4: off"),
    "39-log-n-of-own-tokens": Seen({"context parallel": "2", "log n": "trained"}, "loss of step 1: off"),
    "40-largest-logits-of-other-heads": Seen({"context parallel": "2-heads", "qk clip": "on"}, "loss of step 2: off"),
    "41-window-seen-twice": Seen({"contexts": "long", "position": "rerope"}, "held-out loss in context 100 of step 4: off"),
    "42-recent-keys-of-every-rank": Seen(
        {"contexts": "long", "context parallel": "2"}, "held-out loss in context 100 of step 4: off"
    ),
    "43-gradient-of-the-copy-dropped": Seen({"pipeline parallel": "2"}, "gradient norm of step 1: off"),
    "44-copy-as-it-was": Seen({"pipeline parallel": "2"}, "loss of step 2: off"),
    "45-copy-as-before-the-resume": Seen({"pipeline parallel": "2-interleaved"}, RESUMED),
    "46-norm-of-own-stage": Seen({"pipeline parallel": "2", "clipping": "tight"}, "gradient norm of step 1: off"),
    "47-last-micro-batch-not-averaged": Seen(
        {"pipeline parallel": "2-interleaved", "engine": "zero-2", "data ranks": "2"}, "gradient norm of step 1: off"
    ),
    "48-loss-of-own-stage": Seen({"pipeline parallel": "2"}, "it ended with"),
    "49-head-folded-as-a-step-of-its-own": Seen(
        {"pipeline parallel": "2", "engine": "fold"}, "final model.embed_tokens.weight: off"
    ),
    "50-loads-of-own-tokens": Seen({**EXPERTS, "data ranks": "2"}, "loss of step 2: off"),
    "51-router-losses-of-every-tensor-rank": Seen(
        {**EXPERTS, "routing": "mixtral", "tensor parallel": "2"}, "gradient norm of step 1: off"
    ),
    "52-router-gradient-of-own-hidden-units": Seen({**EXPERTS, "tensor parallel": "2"}, "gradient norm of step 1: off"),
    "53-router-biases-lost-by-a-resume": Seen(EXPERTS, RESUMED),
    "54-gradients-of-other-copies": Seen(EXPERTS, "gradient norm of step 1: off"),
    "55-loads-of-own-part-of-a-sequence": Seen(
        {**EXPERTS, "routing": "losses", "context parallel": "2"}, "gradient norm of step 1: off"
    ),
    "56-bias-counts-in-the-weight": Seen(EXPERTS, "gradient norm of step 2: off"),
    "57-gradients-of-experts-as-of-one-rank": Seen(
        {"feed forward": "moe-2-ranks", "data ranks": "2"}, "gradient norm of step 1: off"
    ),
    "58-experts-shown-to-deepspeed": Seen({"feed forward": "moe-2-ranks", "data ranks": "2"}, "loss of step 1: off"),
}


def test_every_patch_has_its_configuration():
    assert list(PATCHES) == list(SEEN)


@pytest.mark.parametrize("name", PATCHES)
def test_patch_applies(name: str):
    check = ["git", "apply", "--check", str(PATCHES[name])]
    found = subprocess.run(check, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert not found.returncode, f"make the patch again, the code has moved: {found.stderr}"


@pytest.mark.parametrize("name", SEEN)
def test_the_array_holds_the_values_that_show_the_fault(name: str):
    assert any(SEEN[name].values.items() <= row.items() for row in array.whole())


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    corpus.make(folder)
    return folder


def patched(patch: Path, shards: Path, folder: Path) -> tuple[Path, Path]:
    """A copy of the repository with a fault, and a place for its runs."""
    copy, kept = folder / "copy", folder / "kept"
    for package in PACKAGES:
        copytree(ROOT / package, copy / package, ignore=ignore_patterns("__pycache__"))
    subprocess.run(["git", "apply", str(patch)], cwd=copy, check=True, timeout=60)
    kept.mkdir()
    (kept / "corpus").symlink_to(shards)
    return copy, kept


def checked(values: dict[str, str], copy: Path, kept: Path) -> tuple[int, str]:
    """Run the check in a process group of its own, of which nothing is left."""
    chosen = [word for name, value in values.items() for word in ("--set", f"{name}={value}")]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.combinations", "--keep", str(kept), *chosen],
        cwd=copy, env={**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        screen, _ = process.communicate(timeout=SECONDS)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return process.returncode, screen


CONFIGURATIONS = {", ".join(f"{name}={value}" for name, value in seen.values.items()): seen.values for seen in SEEN.values()}


@pytest.mark.slow
@pytest.mark.parametrize("values", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_without_a_fault_it_is_green(shards: Path, tmp_path: Path, values: dict[str, str]):
    with served_bucket() as store:
        assert check({**default(), **values}, Place(shards, store, tmp_path), "green") == ""


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 100)
@pytest.mark.parametrize("name", SEEN)
def test_fault_is_seen(shards: Path, tmp_path: Path, name: str):
    status, screen = checked(SEEN[name].values, *patched(PATCHES[name], shards, tmp_path))
    assert status == 1, f"nobody saw it: {screen}"
    assert SEEN[name].words in screen, screen
