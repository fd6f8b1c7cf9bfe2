"""A step never waits for a GPU.

Run on the meta device: it has no numbers, so reading one raises, and copies from the CPU are watched. What DeepSpeed does
between our calls is not seen here.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from launch.config import RunConfig
from launch.load_config import build_config
from model import loss
from model.decoder import Decoder
from model.initialization import rms_floors
from model.parallel.layers import serial_kit
from model.parallel.mesh import Mesh
from tests.trainer.rules import EMBEDDING_ADAMW, SEEN
from tests.trainer.tiny import Batch
from trainer.engines import fold
from trainer.optimizers.fragments import whole_fragments
from trainer.optimizers.rates import UpdateStep
from trainer.optimizers.step import Optimizer

META = torch.device("meta")
SEQUENCE = 64


class Copies(TorchFunctionMode):
    """Notes everything that would bring numbers from the CPU to the device and wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        keywords = keywords or {}
        name = getattr(function, "__name__", str(function))
        first = arguments[0] if arguments else None
        to_device = any(str(x) == "meta" for x in (*arguments[1:], *keywords.values()) if isinstance(x, str | torch.device))
        on_device = isinstance(first, Tensor) and first.device == META
        if name in ("tensor", "as_tensor", "to") and to_device and not on_device and not keywords.get("non_blocking"):
            self.found.append(f"{name} of {first}")
        if name == "copy_" and on_device and arguments[1].device != META:
            self.found.append("copy_ from the CPU")
        return function(*arguments, **keywords)


def configuration(optimizer: dict[str, Any], *overrides: str) -> RunConfig:
    """A small network."""
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    lazy = optimizer.get("rules") == SEEN
    train = {"sequence_length": SEQUENCE, "micro_batch_size": 2, "global_batch_size": 4, "precision": "bf16"}
    return build_config({"model": sizes | {"tie_word_embeddings": not lazy}, "optimizer": optimizer, "train": train}, overrides)


def network(config: RunConfig) -> Decoder:
    """It, without numbers."""
    with META:
        return Decoder(config.model, config.position, SEQUENCE, serial_kit(torch.bfloat16))


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device takes the ways of a GPU."""
    monkeypatch.setitem(loss.CHUNKS, "meta", loss.CHUNKS["cuda"])


@pytest.mark.parametrize(
    "optimizer", [{}, {"tiger": {"non_finite": "shrink"}}, {"rules": SEEN}, {"tiger": {"embedding_rms": "row"}}]
)
@pytest.mark.parametrize("position", [(), ("position.kind=leaky-rerope", "position.window=16", "position.leak=4.0")])
def test_fold(pretend: None, optimizer: dict[str, Any], position: tuple[str, ...]) -> None:
    config = configuration({"name": "tiger", **optimizer}, "parallel.engine=fold", *position)
    model = network(config)
    engine = fold.Fold(
        model, config.optimizer, Mesh(device=META), seed=0, rms_floor=rms_floors(model), bucket_numbers=1 << 20
    )  # fmt: skip
    ids = torch.zeros(2, SEQUENCE, dtype=torch.int64)
    documents = torch.tensor([0, 20, SEQUENCE, 2 * SEQUENCE], dtype=torch.int32)
    batches = [Batch(ids, ids), Batch(ids, ids, documents)]
    with Copies() as copies:
        engine.accumulate(batches)  # makes the tables of the rotations
        copies.found.clear()
        engine.accumulate(batches)
        engine.update(1e-3)
    assert copies.found == []


RULES = [
    *({"name": name, "compile": compiled} for name in ("tiger", "lion", "adamw") for compiled in (False, True)),
    *({"name": name, "rules": rules} for name in ("tiger", "lion") for rules in (EMBEDDING_ADAMW, SEEN)),
    {"name": "adamw", "rules": SEEN},
    {"name": "tiger", "tiger": {"non_finite": "shrink"}},
    {"name": "tiger", "tiger": {"embedding_rms": "row"}},
]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_update(rule: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "_fused_sgd_", lambda *_, **__: None)  # torch has no form of it for the meta device
    config = configuration(rule)
    settings = config.optimizer
    model = network(config)
    fragments, floors = whole_fragments(dict(model.named_parameters()), Mesh(device=META)), rms_floors(model)
    for fragment in fragments:
        fragment.values = fragment.values.detach().float()
        fragment.gradient = torch.zeros_like(fragment.values)
    moves = Optimizer(settings, fragments, Mesh(device=META), floors, partitioned=True)
    seen_V = torch.zeros(256, dtype=torch.bool, device=META)
    with Copies() as copies, torch.no_grad():
        moves.update(UpdateStep(3, 1e-3, seen_V))
    assert copies.found == []


def test_what_waits_is_found() -> None:
    with Copies() as copies:
        torch.tensor([1.0], device=META)
        torch.ones(2).to(META)
        torch.empty(2, device=META).copy_(torch.ones(2))
        torch.ones(2).to(META, non_blocking=True)
        torch.full((), 2.0, device=META)
    assert len(copies.found) == 3
