"""What only a GPU can show: the same curve as on a CPU, no waiting inside a step, the same rounding.

pytest -m gpu        # one GPU is enough; several are used by `torchrun`, not here
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch

from launch import runtime
from launch.config import build
from launch.train import make_engine
from model import decoder
from model.parallel import make_topology
from tests.ranks import run_ranks
from tests.trainer.tiny import Batch
from trainer import onepass, rounding

pytestmark = pytest.mark.gpu

GPU = "cuda"
ENGINES = [("zero", 1), ("zero", 2), ("zero", 3), ("fold", 1)]
LENGTH, STEPS = 128, 6


def configuration(engine: str, stage: int, *overrides: str) -> Any:
    """A small network with two regions of attention, one rank."""
    return build({
        "model": {
            "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1,
        },
        "position": {"kind": "leaky-rerope", "window": 32, "leak": 4.0},
        "optimizer": {"name": "tiger", "learning_rate": 2e-3},
        "train": {"sequence_length": LENGTH, "micro_batch_size": 2, "global_batch_size": 4, "precision": "fp32"},
        "parallel": {"engine": engine, "zero_stage": stage},
    }, overrides)  # fmt: skip


def batches(step: int, pinned: bool) -> list[Batch]:
    """Two micro-batches; the second has packed documents."""
    ids = torch.randint(512, (2, 2, LENGTH + 1), generator=torch.Generator().manual_seed(step))
    bounds = torch.tensor([0, 50, LENGTH, 2 * LENGTH], dtype=torch.int32)
    rows = [(micro[:, :-1].contiguous(), micro[:, 1:].contiguous()) for micro in ids]
    if pinned:
        rows = [(inputs.pin_memory(), targets.pin_memory()) for inputs, targets in rows]
    return [Batch(*rows[0]), Batch(*rows[1], bounds)]


def draw_on_a_cpu() -> None:
    """Initial weights as a CPU draws them: a GPU has another generator, and so another network."""
    own = decoder.draw

    def drawn(shape: tuple[int, ...], std: float, seed: int, name: str, device: torch.device) -> torch.Tensor:
        return own(shape, std, seed, name, torch.device("cpu")).to(device)

    decoder.draw = drawn


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever waits for the GPU raises. torch's own check does not see waits for the whole device."""

    def refused(device: Any = None) -> None:
        raise RuntimeError("torch.cuda.synchronize() in a step")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "synchronize", refused)
        torch.cuda.set_sync_debug_mode("error")
        yield
        torch.cuda.set_sync_debug_mode("default")


def losses(rank: int, world_size: int, kind: str, engine: str, stage: int, overrides: list[str], strict: bool) -> list[float]:
    """The loss of every step; `strict` raises at whatever waits for the GPU after two steps."""
    draw_on_a_cpu()
    here = runtime.world()
    device = runtime.choose_device(kind, here)
    runtime.prepare_process(device, here)
    runtime.join(device, here, timeout_seconds=120)
    config = configuration(engine, stage, *overrides)
    trained = make_engine(config, make_topology(1, device), world_size)
    passes, found = config.train.global_batch_size // config.train.micro_batch_size, []
    for step in range(STEPS):
        made = batches(step, pinned=device.type == GPU)[:passes]
        with no_waiting() if strict and step >= 2 else nullcontext():
            found.append(trained.accumulate(made))
            trained.update(2e-3)
    return [float(loss) for loss in found]


def run(*arguments: Any) -> list[float]:
    """`losses` on one rank in a process of its own."""
    return run_ranks(losses, 1, *arguments, timeout_seconds=280, grouped=False, method="spawn")[0]


@pytest.mark.parametrize("name", ["tiger", "lion", "adamw"])
@pytest.mark.parametrize(("engine", "stage"), ENGINES)
def test_the_curve_is_that_of_a_cpu(engine: str, stage: int, name: str) -> None:
    if engine == "fold" and name != "tiger":
        pytest.skip("fold runs Tiger only")
    overrides = [f"optimizer.name={name}", f"optimizer.learning_rate={2e-3 if name == 'tiger' else 1e-3}"]
    assert run(GPU, engine, stage, overrides, False) == pytest.approx(run("cpu", engine, stage, overrides, False), rel=1e-4)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("engine", "stage", "passes"), [("zero", 1, 1), ("zero", 2, 2), ("fold", 1, 2)])
def test_no_step_waits_for_the_gpu(engine: str, stage: int, passes: int, compiled: bool) -> None:
    overrides = ["train.precision=bf16", f"train.compile={str(compiled).lower()}"]
    if passes == 1:
        overrides += ["train.global_batch_size=2"]  # with several, DeepSpeed's stage 1 looks at the norm
    assert run(GPU, engine, stage, overrides, True)[-1] < 7


def test_rounding_draws_what_a_cpu_draws() -> None:
    key, source = rounding.key(1, 2, "weight"), torch.randn(300, 200)
    want, got = torch.empty(300, 200, dtype=torch.bfloat16), torch.empty(300, 200, dtype=torch.bfloat16, device=GPU)
    rounding.Draw(key, 7, 9, 300, 200, torch.device("cpu")).round_(want, source.clone(), 0, 0)
    draw = rounding.Draw(key, 7, 9, 300, 200, torch.device(GPU))
    draw.round_(got, source.to(GPU), 0, 0)
    assert torch.equal(want, got.cpu())
    compiled = onepass.compiled(rounding.rounded)(source.to(GPU), draw.a, draw.b, draw.h)
    assert torch.equal(want, compiled.cpu())
