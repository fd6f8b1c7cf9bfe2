"""A case of tests/model/huggingface/stock.py as transformers has it, as files, and as the checkpoint that it is imported to."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from launch.checkpoints import read_checkpoint_manifest, read_tensor
from launch.commands.import_model import import_model
from tests.model.huggingface.stock import Case, stock_model


@dataclass(frozen=True)
class Imported:
    """A model in three forms."""

    stock: Any
    """transformers', in the precision of the files."""
    files: Path
    """config.json and safetensors."""
    checkpoint: Path


def import_case(case: Case, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Imported:
    """Write a case's files with tensors of `dtype` and import them; `changes` are of its configuration."""
    stock_model(case, **changes).to(dtype).save_pretrained(folder / "files")
    import_model(folder / "files", folder / "checkpoint")
    # read again: `to` rounds the frequencies of the rotation too, which are no weights and are not in the files
    return Imported(read_stock(folder / "files"), folder / "files", folder / "checkpoint")


def read_stock(files: Path) -> Any:
    """What transformers makes of a folder, in the precision of its files."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own
        return AutoModelForCausalLM.from_pretrained(files, dtype="auto", attn_implementation="eager").eval()


def stored(files: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's safetensors by name, in the precision in which it is stored."""
    found: dict[str, Tensor] = {}
    for path in sorted(files.glob("*.safetensors")):
        with safe_open(str(path), framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    return found


def saved(checkpoint: Path | str) -> dict[str, Tensor]:
    """Every weight of a checkpoint by its name in the network, in the precision in which it is stored."""
    manifest = read_checkpoint_manifest(checkpoint)
    names = [name for name in manifest.shapes if name.startswith("weight/")]
    return {name.removeprefix("weight/"): read_tensor(checkpoint, name, manifest) for name in names}


def stock_names(case: Case, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' weights under the names of the network: what a family holds in one tensor is cut, stacks of experts are
    taken apart, and a head that is tied is left out. Written beside the importer's own rules, which it is to check."""
    settings, found = case.settings, {}
    for old, new in ((".block_sparse_moe.", ".mlp."), ("w1.weight", "gate_proj.weight"), ("w2.weight", "down_proj.weight"),
                     ("w3.weight", "up_proj.weight")):  # fmt: skip
        weights = {name.replace(old, new) if case.family == "mixtral" else name: tensor for name, tensor in weights.items()}
    heads, kv = settings["num_attention_heads"], settings["num_key_value_heads"]
    width = settings.get("head_dim") or settings["hidden_size"] // heads
    inner = settings["intermediate_size"]
    cuts = {
        "qkv_proj": {"q_proj": heads * width, "k_proj": kv * width, "v_proj": kv * width},
        "gate_up_proj": {"gate_proj": inner, "up_proj": inner},
    }
    for name, tensor in weights.items():
        module = name.split(".")[-2]
        if name.endswith("experts.gate_up_proj"):
            for expert, (gate, up) in enumerate(each.chunk(2) for each in tensor):
                prefix = f"{name.removesuffix('gate_up_proj')}{expert}"
                found |= {f"{prefix}.gate_proj.weight": gate, f"{prefix}.up_proj.weight": up}
        elif name.endswith("experts.down_proj"):
            prefix = name.removesuffix("down_proj")
            found |= {f"{prefix}{expert}.down_proj.weight": each for expert, each in enumerate(tensor)}
        elif module in cuts:
            rows = tensor.split(list(cuts[module].values()))
            found |= {name.replace(module, part): cut for part, cut in zip(cuts[module], rows, strict=True)}
        else:
            found[name] = tensor
    return found


def same_bits(ones: dict[str, Tensor], others: dict[str, Tensor]) -> str:
    """The first tensor that is not the same in both; empty if all are."""
    if ones.keys() != others.keys():
        return f"only one has {sorted(ones.keys() ^ others.keys())}"
    for name, one in ones.items():
        other = others[name]
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return f"{name}: {one.dtype} {list(one.shape)} became {other.dtype} {list(other.shape)}"
        if not torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)):
            return f"{name}: other bits"
    return ""
