"""Experts in files: one by one, in stacks, behind other layers; and in a model that was trained on and goes out again."""

from pathlib import Path

import pytest
import torch

from launch.commands.export import export_model
from launch.commands.import_model import import_model
from launch.trained import open_checkpoint
from tests.combinations import corpus as shards
from tests.families.folders import TOKENS_BS, distance, edit_config, edit_tensors, ours, theirs
from tests.families.imported import import_case, same_bits, saved, stored
from tests.families.quick import FIRST, some_slow
from tests.families.test_training import OVERRIDES, STEPS, train_ours
from tests.model.huggingface.stock import Case, save_stock

WITH_EXPERTS = [case for case in FIRST if "num_experts_per_tok" in case.settings or case.family == "mixtral"]
V3 = Case("deepseek_v3", "experts, groups")
EXPERT, BIAS = "model.layers.2.mlp.experts.5.up_proj.weight", "model.layers.2.mlp.gate.e_score_correction_bias"
NEAR = 1e-5


def test_all_families_with_experts_are_here():
    assert [case.family for case in WITH_EXPERTS] == ["mixtral", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3"]


@pytest.mark.parametrize("case", WITH_EXPERTS, ids=str)
def test_stacks_are_the_experts_one_by_one(case: Case, tmp_path: Path):
    """As transformers writes them if it is told not to take them apart."""
    model = save_stock(case, tmp_path / "single")
    model.save_pretrained(tmp_path / "stacked", save_original_format=False)
    names = stored(tmp_path / "stacked")
    assert any(name.endswith("experts.gate_up_proj") for name in names) and not any(".experts.0." in name for name in names)
    assert distance(theirs(tmp_path / "stacked"), ours(tmp_path / "stacked", tmp_path / "one")) < NEAR
    import_model(tmp_path / "single", tmp_path / "other")
    assert not same_bits(saved(tmp_path / "one"), saved(tmp_path / "other"))


def test_a_stack_of_another_shape_is_refused(tmp_path: Path):
    save_stock(V3, tmp_path / "single").save_pretrained(tmp_path / "stacked", save_original_format=False)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    edit_tensors(tmp_path / "stacked", name, lambda tensors: tensors.update({name: tensors[name][:-1]}))
    with pytest.raises(
        ValueError, match=r"experts.gate_up_proj of shape \(7, 48, 64\), its config.json asks for \(8, 48, 64\)"
    ):
        import_model(tmp_path / "stacked", tmp_path / "one")


@pytest.mark.parametrize("name", [EXPERT, BIAS])
def test_a_missing_tensor_is_named(name: str, tmp_path: Path):
    save_stock(V3, tmp_path / "stock")
    edit_tensors(tmp_path / "stock", name, lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=f"lacks {name}, which does not fit its config.json"):
        import_model(tmp_path / "stock", tmp_path / "one")


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path):
    """As in DeepSeek-V3's own files, where they are number 61."""
    save_stock(V3, tmp_path / "stock")
    expected = theirs(tmp_path / "stock")
    further = {"model.layers.4.eh_proj.weight": torch.ones(64, 128), "model.layers.4.mlp.gate.weight": torch.ones(8, 64)}
    edit_tensors(tmp_path / "stock", BIAS, lambda tensors: tensors.update(further))
    told = import_model(tmp_path / "stock", tmp_path / "one")
    assert "left out 2 tensors of layers that predict further tokens: the network does without them" in told
    assert not any(".layers.4." in name for name in saved(tmp_path / "one"))
    assert distance(expected, ours(tmp_path / "stock", tmp_path / "two")) < NEAR
    edit_config(tmp_path / "stock", {"num_nextn_predict_layers": 0})
    with pytest.raises(ValueError, match=r"has model.layers.4.* and 1 more, which does not fit its config.json"):
        import_model(tmp_path / "stock", tmp_path / "three")


def test_biases_of_routers_stay_float32(tmp_path: Path):
    """In bfloat16 two experts of nearly the same load could change places."""
    imported = import_case(V3, tmp_path)
    export_model(str(imported.checkpoint), tmp_path / "out", dtype="bfloat16", tokenizer="none")
    before, after = stored(imported.files), stored(tmp_path / "out")
    assert after[BIAS].dtype == torch.float32 and torch.equal(after[BIAS], before[BIAS])
    assert {each.dtype for name, each in after.items() if not name.endswith("bias")} == {torch.bfloat16}


@pytest.mark.parametrize("case", some_slow(WITH_EXPERTS, [V3]), ids=str)
def test_a_model_that_was_trained_on_is_the_same_in_transformers(case: Case, tmp_path: Path):
    """The biases of DeepSeek-V3's routers have moved, and count there."""
    shards.make(tmp_path)
    imported = import_case(case, tmp_path, vocab_size=shards.VOCABULARY)
    before = saved(imported.checkpoint)
    arguments = [
        str(imported.checkpoint / "config.toml"), f"run.dir={tmp_path}/run", f"data.train={tmp_path}/shards/train",
        f"data.tokenizer={tmp_path}/tokenizer", f"checkpoint.resume={imported.checkpoint}", *OVERRIDES,
        "model.router_bias_rate=0.05",
    ]  # fmt: skip
    after = train_ours(arguments, 1, tmp_path / "run").weights
    still = [name for name in before if torch.equal(before[name], after[name])]
    assert not still and (BIAS in after) == (case == V3)
    checkpoint = str(tmp_path / f"run/checkpoints/step-{STEPS:08d}")
    export_model(checkpoint, tmp_path / "out", tokenizer="none")
    with torch.no_grad():
        logits = open_checkpoint(checkpoint, torch.device("cpu"), torch.float32).decoder(TOKENS_BS)
    assert distance(theirs(tmp_path / "out"), logits) < NEAR
    assert distance(theirs(imported.files), logits) > 100 * NEAR
