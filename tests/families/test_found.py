"""Models that were once imported as another network, in and out: transformers' logits from the folder, from tiglon, and from
transformers again when tiglon has exported it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from launch.checkpoints import read_meta
from launch.commands.export import export_model
from launch.commands.import_model import import_model
from launch.load_config import build_config
from tests.families.folders import distance, edit_config, edit_tensors, ours, theirs
from tests.families.keys import quiet
from tests.model.huggingface.stock import YARN, Case, save_stock

K = "model.layers.1.self_attn.k_proj.weight"
NEAR = 1e-5
LEFT_OUT = ("layer_types",)

FOUND: dict[str, tuple[str, str, dict[str, Any], tuple[str, ...]]] = {
    "the upper layers of Qwen3 are windowed": ("qwen3", "upper layers windowed", {"max_window_layers": 2}, LEFT_OUT),
    "one layer of Qwen3 is full": ("qwen3", "upper layers windowed", {"max_window_layers": 1}, LEFT_OUT),
    "all layers of Qwen3 are full": ("qwen3", "upper layers windowed", {"max_window_layers": 4}, LEFT_OUT),
    "the upper layers of Qwen2 are windowed": ("qwen2", "upper layers windowed", {"max_window_layers": 2}, LEFT_OUT),
    "YaRN with a factor of 1": ("llama", "yarn", {"rope_parameters": {**YARN, "attention_factor": 1.0}}, ()),
    "YaRN with mscale": ("llama", "yarn", {"rope_parameters": {**YARN, "mscale": 0.5, "mscale_all_dim": 1.0}}, ()),
    "YaRN with one mscale": ("llama", "yarn", {"rope_parameters": {**YARN, "mscale": 0.5}}, ()),
    "latent attention, mscale": (
        "deepseek_v3", "yarn", {"rope_parameters": {**YARN, "mscale": 0.5, "mscale_all_dim": 1.0}}, (),
    ),
    "latent attention, mscale_all_dim alone": ("deepseek_v3", "yarn", {"rope_parameters": {**YARN, "mscale_all_dim": 1.0}}, ()),
    "Mistral with a window and YaRN": ("mistral", "window, yarn", {}, ()),
    "Qwen3 with windows and YaRN": ("qwen3", "windows, yarn", {}, ()),
    "Llama without rms_norm_eps": ("llama", "plain", {}, ("rms_norm_eps",)),
    "Phi-3 without rms_norm_eps": ("phi3", "plain", {}, ("rms_norm_eps",)),
    "SmolLM3 without its layers": ("smollm3", "plain", {}, ("no_rope_layers",)),
    "Qwen3 without head_dim's default": ("qwen3", "tied, biases", {"head_dim": 16}, ()),
    "old rope_scaling": (
        "llama", "yarn", {"rope_theta": 5e3, "rope_scaling": {"type": "linear", "factor": 2.0}}, ("rope_parameters",),
    ),
    "rope_scaling beside rope_parameters": ("llama", "plain", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, ()),
}  # fmt: skip
"""What is wrong when it comes back -> family, model, changes of its config.json, keys that are taken out."""


@pytest.fixture(autouse=True)
def _quiet() -> None:
    quiet()


def in_and_out(folder: Path, root: Path) -> None:
    """The logits of a folder, imported; of transformers, exported; the configuration, imported again."""
    expected = theirs(folder)
    assert distance(expected, ours(folder, root / "in")) < NEAR
    export_model(str(root / "in"), root / "out", tokenizer="none")
    assert distance(expected, theirs(root / "out")) < NEAR
    import_model(root / "out", root / "again")
    first, second = (build_config(read_meta(str(root / name)).config) for name in ("in", "again"))
    assert (first.model, first.position) == (second.model, second.position)


@pytest.mark.parametrize("name", FOUND)
def test_a_network_that_was_another_one(name: str, tmp_path: Path) -> None:
    family, model, changes, without = FOUND[name]
    save_stock(Case(family, model), tmp_path / "stock")
    large = {} if family.startswith("deepseek") else {"rms_norm_eps": 0.1}  # the default of the class is far from it
    edit_config(tmp_path / "stock", {**large, **changes}, without)
    in_and_out(tmp_path / "stock", tmp_path)


def test_frequencies_stored_by_an_old_llama(tmp_path: Path) -> None:
    save_stock(Case("llama", "plain"), tmp_path / "stock")
    name = "model.layers.{}.self_attn.rotary_emb.inv_freq"
    edit_tensors(tmp_path / "stock", K, lambda tensors: tensors.update({name.format(i): torch.ones(8) for i in range(4)}))
    in_and_out(tmp_path / "stock", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUND)
def test_the_change_is_visible(name: str, tmp_path: Path) -> None:
    """Without it transformers computes something else, or the model has what is to be seen as it is."""
    family, model, changes, without = FOUND[name]
    save_stock(Case(family, model), tmp_path / "stock")
    edit_config(tmp_path / "stock", {"rms_norm_eps": 0.1})
    before = theirs(tmp_path / "stock")
    edit_config(tmp_path / "stock", changes, without)
    unchanged = distance(before, theirs(tmp_path / "stock")) < 100 * NEAR
    assert unchanged == (name in SAME), name


SAME = {
    "the upper layers of Qwen3 are windowed", "the upper layers of Qwen2 are windowed", "Mistral with a window and YaRN",
    "Qwen3 with windows and YaRN", "Qwen3 without head_dim's default", "SmolLM3 without its layers", "YaRN with one mscale",
}  # fmt: skip
"""Other spellings of the network that was saved, or that network itself."""
