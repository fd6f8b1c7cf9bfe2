"""No key of a config.json makes a silently different network, a crash, or a refusal that does not name it."""

from pathlib import Path

import pytest
import torch

from tests.families import keys
from tests.families.keys import GONE, MAIN, Change, Folder, Result, Theirs, changes, quiet, results, same, verdict
from tests.model.huggingface.stock import Case

SLOW = 1800
"""Seconds; a minute on a quiet core."""


@pytest.fixture(autouse=True)
def _quiet() -> None:
    quiet()


def faults(found: list) -> str:
    return "\n".join(str(result) for result in found if result.faulty)


@pytest.mark.parametrize("family, every", [("llama", 197), ("gemma3_text", 197)])
def test_a_part_of_the_keys(family: str, every: int, tmp_path: Path) -> None:
    found = results(family, tmp_path, every=every)
    assert len(found) > 7
    assert not (wrong := faults(found)), wrong


@pytest.mark.slow
@pytest.mark.timeout(SLOW)
@pytest.mark.parametrize("family", MAIN)
def test_every_third_change(family: str, tmp_path: Path) -> None:
    """All of them: python -m tests.families.keys"""
    found = results(family, tmp_path, every=3)
    assert len(found) > 250, "a family of which nothing can be imported is no success"
    assert {"used", "harmless", "refused"} <= {result.outcome for result in found}
    assert not (wrong := faults(found)), wrong


@pytest.mark.slow
@pytest.mark.timeout(SLOW)
@pytest.mark.parametrize("family", MAIN)
def test_the_network_in_memory_is_that_of_the_folder(family: str, tmp_path: Path) -> None:
    """What stands for from_pretrained, against it, on some of the changes."""
    folder = Folder(Case(family, MAIN[family]), tmp_path / "one")
    for change in list(changes(folder.case, folder.config))[::9]:
        folder.write(change)
        quick, slow = folder.theirs(), folder.theirs_by_files()
        if change.key[0] in ("initializer_range", "dtype", "torch_dtype", "tie_word_embeddings", "quantization_config"):
            continue
        assert (quick.logits is None) == (slow.logits is None), (str(change), quick.fault, slow.fault)
        if quick.logits is not None and slow.logits is not None:
            assert torch.equal(quick.logits, slow.logits), str(change)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family, name, key",
    [
        ("llama", "plain", "rms_norm_eps"),
        ("llama", "wide heads, linear", "rope_parameters.factor"),
        ("llama", "yarn", "rope_parameters.beta_fast"),
        ("mistral", "window", "sliding_window"),
        ("qwen3", "windows, yarn", "layer_types"),
        ("gemma3_text", "plain", "query_pre_attn_scalar"),
    ],
)
def test_a_key_that_is_passed_over_is_seen(
    family: str, name: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: an importer that takes a key for unchanged, and one that refuses everything in the same words."""
    folder = Folder(Case(family, name), tmp_path / "one")
    chosen = [change for change in changes(folder.case, folder.config) if ".".join(change.key) == key]
    honest = keys.import_model
    assert not folder.result(Change((), GONE)).faulty

    def forgetful(directory: Path, output: Path) -> list[str]:
        folder.write(Change((), GONE))
        return honest(directory, output)

    def curt(directory: Path, output: Path) -> list[str]:
        raise ValueError("this model is not for tiglon")

    monkeypatch.setattr(keys, "import_model", forgetful)
    found = [folder.result(change) for change in chosen]
    assert [result for result in found if result.outcome.startswith("silently different")]
    assert not [result for result in found if result.outcome in ("used", "refused")]
    monkeypatch.setattr(keys, "import_model", curt)
    assert all(folder.result(change).outcome.startswith("does not name it") for change in chosen)


LOGITS = torch.arange(24.0).view(2, 3, 4)
OTHER = LOGITS + 0.01


@pytest.mark.parametrize(
    "theirs, ours, outcome",
    [
        (Theirs(LOGITS), LOGITS, "harmless"),
        (Theirs(OTHER), OTHER, "used"),
        (Theirs(OTHER), LOGITS, "silently different"),
        (Theirs(LOGITS), OTHER, "silently different"),
        (Theirs(LOGITS), LOGITS[..., :3], "silently different"),
        (Theirs(None, "TypeError"), LOGITS, "ignored"),
        (Theirs(None, "TypeError"), OTHER, "accepted, though"),
        (Theirs(None, "lm_head.weight is not stored", unfit=True), LOGITS, "accepted, though"),
        (Theirs(OTHER), "config.json has head_dim = 3; correct it", "refused"),
        (Theirs(OTHER), "config.json has my_head_dim = 3; correct it", "does not name it"),
        (Theirs(OTHER), "lacks model.norm.weight", "does not name it"),
        (Theirs(None, "", unfit=True), "lacks model.norm.weight", "refused"),
        (Theirs(OTHER), "head_dim\nand more", "not one sentence"),
        (Theirs(OTHER), KeyError("head_dim"), "crash"),
    ],
)
def test_what_a_verdict_says(theirs: Theirs, ours: torch.Tensor | str | Exception, outcome: str) -> None:
    assert verdict(Change(("head_dim",), 3), theirs, ours, LOGITS).startswith(outcome)


def test_the_table_counts() -> None:
    case = Case("llama", "plain")
    found = [Result(case, Change(("a",), 1), outcome, "") for outcome in ("used", "used", "refused", "crash: KeyError")]
    found.append(Result(case, Change(("b", "c"), 1), "harmless", ""))
    assert keys.table(found).splitlines()[2:] == ["| llama | 2 | 5 | 2 | 1 |  | 1 | 1 |"]
    rows = keys.table(found, by_key=True).splitlines()[2:]
    assert rows == ["| llama | a | 4 | 2 |  |  | 1 | 1 |", "| llama | b.c | 1 |  | 1 |  |  |  |"]


def test_an_ignored_key_must_change_nothing() -> None:
    """transformers refuses a word for head_dim, which acts; and one for use_cache, which does not."""
    case = Case("llama", "plain")
    acting = [
        Result(case, Change(("head_dim",), "x"), "ignored", "failed"),
        Result(case, Change(("head_dim",), 3), "used", "changed"),
    ]
    idle = [Result(case, Change(("use_cache",), "x"), "ignored", "failed")]
    assert [result.outcome for result in keys.with_acting_keys(acting + idle)] == [keys.ACCEPTED, "used", "ignored"]


def test_a_change_leaves_the_rest() -> None:
    config = {"a": {"b": 1, "c": 2}, "d": 3}
    assert Change(("a", "b"), GONE).apply(config) == {"a": {"c": 2}, "d": 3} and config["a"] == {"b": 1, "c": 2}
    assert Change(("d",), None).apply(config)["d"] is None and not same(LOGITS, OTHER + 1)
