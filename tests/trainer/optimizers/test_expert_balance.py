"""Loads of experts and the biases that follow them: sums over micro-batches and ranks, steps by hand, and updates left out."""

import functools
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.decoder import Decoder
from model.initialization import initialise, rms_floors
from model.parallel.layers import serial_kit
from model.parallel.mesh import Mesh, make_kit, make_mesh
from model.positions.config import PositionConfig
from tests.ranks import run_ranks
from tests.trainer.engines.test_base import LENGTH, SEQUENCES, micro_batches, tokens
from tests.trainer.rules import optimizer
from trainer.config import ParallelConfig, TrainConfig
from trainer.engines.fold import Fold
from trainer.engines.zero import Zero
from trainer.optimizers.expert_balance import ExpertBalance, StepLoads

E, K, RATE = 4, 2, 0.02
SIZES: dict[str, Any] = {
    "vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "initializer_range": 0.4, "feed_forward": "moe", "moe_intermediate_size": 8, "n_routed_experts": E,
    "num_experts_per_tok": K, "first_k_dense_replace": 1, "router_bias_rate": RATE,
}  # fmt: skip
CPU = torch.device("cpu")
NAMES = [f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in (1, 2)]


def network(kit: Any, **keys: Any) -> Decoder:
    model = Decoder(ModelConfig(**{**SIZES, **keys}), PositionConfig(), LENGTH, kit)
    initialise(model, 0)
    return model


def alone(**keys: Any) -> tuple[Decoder, ExpertBalance]:
    model = network(serial_kit(torch.float32), **keys)
    return model, ExpertBalance(model, Mesh())


LOADS = StepLoads((1, 2), torch.tensor([[7.0, 1, 4, 4], [4, 4, 4, 4]]))
STEPS = {"sign": [-1.0, 1.0, 0.0, 0.0], "rms": [-(2**0.5), 2**0.5, 0.0, 0.0]}


@pytest.mark.parametrize("kind", STEPS)
def test_biases_step_against_the_distance_from_the_mean(kind: str):
    model, balance = alone(router_bias_step=kind)
    for count in (1, 2):
        balance.update(LOADS, torch.tensor(False))
        first, second = model.router_biases().values()
        torch.testing.assert_close(first, RATE * count * torch.tensor(STEPS[kind]))
        assert not second.any(), "even loads moved a bias"


@pytest.mark.parametrize(("keys", "skipped"), [({}, True), ({"router_bias_rate": 0.0}, False), ({"router_bias": False}, False)])
def test_biases_stay(keys: dict[str, Any], skipped: bool):
    model, balance = alone(**keys)
    balance.update(LOADS, torch.tensor(skipped))
    assert not any(router.bias_E.any() for router in model.routers().values())


def test_largest_share_is_of_the_worst_layer():
    assert LOADS.largest_share is not None and LOADS.largest_share.item() == 7 / 4
    assert StepLoads().largest_share is None


def test_biases_are_weights_of_a_checkpoint():
    model, balance = alone()
    shards = balance.shards()
    assert [shard.name for shard in shards] == [f"weight/{name}" for name in NAMES] == [
        f"weight/{name}" for name in model.router_biases()
    ]  # fmt: skip
    shards[0].values.copy_(torch.arange(4.0))  # as a resume does
    assert model.routers()[1].bias_E.tolist() == [0, 1, 2, 3]
    assert alone(router_bias=False)[1].shards() == []


def test_a_bfloat16_network_on_another_dtype_keeps_them_in_float32():
    model = network(serial_kit(torch.float32)).to(torch.bfloat16)
    assert {bias.dtype for bias in model.router_biases().values()} == {torch.float32}
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def engine_of(kind: str, mesh: Mesh, count: int) -> Zero | Fold:
    model = network(make_kit(mesh))
    floors = rms_floors(model)
    if kind == "fold":
        return Fold(model, optimizer("tiger", max_grad_norm=0.0), mesh, seed=0, rms_floor=floors, bucket_numbers=2000)
    parallel = ParallelConfig(tensor_parallel_size=mesh.tensor.size, zero_stage=int(kind[-1]))  # type: ignore[arg-type]
    size = SEQUENCES // mesh.data.size // count
    train = TrainConfig(precision="fp32", micro_batch_size=size, global_batch_size=SEQUENCES)
    return Zero(model, parallel, optimizer("adamw"), train, mesh, floors)


def two_steps(_: int, __: int, tensor_parallel_size: int, cases: list[tuple[str, int]]) -> list[Any]:
    """Of each engine: loads of the first step, the biases after it, and after a step whose gradients are not finite."""
    warnings.filterwarnings("ignore")  # DeepSpeed's own
    mesh, found = make_mesh(tensor_parallel_size, CPU), []
    for kind, count in cases:
        engine = engine_of(kind, mesh, count)
        with torch.no_grad():  # an evaluation before, which does not count
            engine.model(tokens(5).inputs_BS)
        engine.accumulate(micro_batches(0, mesh, count))
        result = engine.update(1e-3)
        after = [bias.numpy().copy() for bias in engine.model.router_biases().values()]
        with torch.no_grad():
            for router in engine.model.routers().values():
                router.replicate = lambda weight: weight * float("nan")  # what a NaN in the weight comes to, under any engine
        engine.accumulate(micro_batches(1, mesh, count))
        bad = engine.update(1e-3)
        later = [bias.numpy().copy() for bias in engine.model.router_biases().values()]
        assert result.loads.token_LE is not None
        found.append((bool(result.skipped), result.loads.token_LE.numpy().copy(), after, bool(bad.skipped), later))
        engine.close()
    return found


@functools.cache
def chosen() -> Tensor:
    """How many tokens of the whole batch go to each expert, seen by what routers return, [2, E]."""
    model, seen = network(serial_kit(torch.float64)), dict[int, Tensor]()

    def hook(layer: int) -> Any:
        return lambda module, inputs, output: seen.__setitem__(layer, torch.bincount(output[1].flatten(), minlength=E))

    for layer, router in model.routers().items():
        router.register_forward_hook(hook(layer))
    model(tokens(0).inputs_BS)
    return torch.stack([seen[1], seen[2]])


@pytest.mark.parametrize(
    ("world_size", "tensor_parallel_size", "cases"),
    [
        (1, 1, [("zero-1", 3), ("fold", 3)]),
        (2, 1, [("zero-1", 3), ("zero-2", 1), ("zero-3", 3), ("fold", 1)]),
        (2, 2, [("zero-1", 1), ("fold", 3)]),
    ],
)
def test_loads_are_of_all_tokens_of_an_update(world_size: int, tensor_parallel_size: int, cases: list[tuple[str, int]]):
    ranks = run_ranks(two_steps, world_size, tensor_parallel_size, cases)
    want = chosen()
    assert want.sum(1).tolist() == [SEQUENCES * LENGTH * K] * 2
    moved = -RATE * (want - want.double().mean(1, keepdim=True)).sign()
    for found in ranks:
        for (skipped, loads, after, bad, later), case in zip(found, cases, strict=True):
            assert loads.tolist() == want.tolist(), case
            assert not skipped and bad, case
            torch.testing.assert_close(torch.from_numpy(np.stack(after)).double(), moved)
            assert all((one == other).all() for one, other in zip(after, later, strict=True)), f"{case}: moved without a step"
