"""Saved models: what is stored in them, changed; and the logits that transformers and tiglon compute from them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from launch.commands.import_model import import_model
from launch.trained import open_checkpoint
from tests.model.huggingface.stock import stock_logits

INDEX = "model.safetensors.index.json"
TOKENS_BS = torch.randint(0, 96, (2, 40), generator=torch.Generator().manual_seed(2))


def theirs(folder: Path) -> Tensor:
    """Logits of transformers in float32."""
    settings: dict[str, Any] = {"attn_implementation": "eager", "dtype": torch.float32}
    return stock_logits(transformers.AutoModelForCausalLM.from_pretrained(folder, **settings).eval(), TOKENS_BS)


def ours(folder: Path, output: Path) -> Tensor:
    """Logits of tiglon in float32, from a checkpoint imported to `output`."""
    import_model(folder, output)
    with torch.no_grad():
        return open_checkpoint(str(output), torch.device("cpu"), torch.float32).decoder(TOKENS_BS)


def distance(one: Tensor, other: Tensor) -> float:
    """Largest difference, relative to the largest logit."""
    return float((one - other).abs().max() / one.abs().max())


def edit_config(folder: Path, changes: dict[str, Any], without: tuple[str, ...] = ()) -> None:
    """Change keys of config.json and take others out."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key not in without}))


def file_of(folder: Path, name: str) -> Path:
    """The file that holds a tensor."""
    if not (folder / INDEX).exists():
        return folder / "model.safetensors"
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def edit_tensors(folder: Path, beside: str, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Edit the tensors of the file that holds the tensor `beside`; the index follows."""
    path = file_of(folder, beside)
    tensors = load_file(path)
    before = set(tensors)
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    if (folder / INDEX).exists():
        index = json.loads((folder / INDEX).read_text())
        kept = {name: file for name, file in index["weight_map"].items() if name in tensors or name not in before}
        index["weight_map"] = kept | dict.fromkeys(tensors, path.name)
        (folder / INDEX).write_text(json.dumps(index))
