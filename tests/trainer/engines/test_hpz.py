"""ZeRO 3 with one more copy of the weights in every node (hpZ): the same bits as without, and gathers from that copy."""

from typing import Any

import pytest
import torch

from model.config import ModelConfig
from model.decoder import Decoder
from model.initialization import initialise
from model.parallel.mesh import make_kit, make_mesh
from model.positions.config import PositionConfig
from tests.ranks import run_ranks
from tests.trainer.rules import optimizer
from tests.trainer.tiny import sequences, split
from trainer.config import ParallelConfig, TrainConfig
from trainer.engines.zero import Zero

# matrices of more than 100,000 numbers, also when split in two: DeepSpeed never parts with smaller ones
MODEL = ModelConfig(
    vocab_size=64, hidden_size=480, intermediate_size=480, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4
)
MATRICES, STEPS = 7, 4


def _copies(model: Decoder) -> list[float]:
    """The size of each copy inside a node, as a share of its weight."""
    weights: list[Any] = list(model.parameters())
    return [
        weight.ds_secondary_tensor.numel() / weight.ds_numel for weight in weights if weight.ds_secondary_tensor is not None
    ]


def _train(rank: int, world_size: int, tensor_parallel_size: int, hpz: int, precision: Any) -> dict[str, Any]:
    """Losses and gradient norms, in the middle of which other weights are read in; and the copies before and after updates."""
    mesh = make_mesh(tensor_parallel_size, torch.device("cpu"))
    model = Decoder(MODEL, PositionConfig(), 12, make_kit(mesh))
    initialise(model, 0)
    parallel = ParallelConfig(tensor_parallel_size=tensor_parallel_size, zero_stage=3, zero_hpz_partition_size=hpz)
    train = TrainConfig(precision=precision, micro_batch_size=1, global_batch_size=8)
    count = 8 // mesh.data.size
    engine = Zero(model, parallel, optimizer(name="adamw"), train, mesh, 0.02)
    found: dict[str, Any] = {"curve": [], "before": [], "after": []}
    for step in range(STEPS):
        batches = split(split(sequences(step, 8, 12), mesh.data.size)[mesh.data.rank], count)
        found["curve"].append(engine.accumulate(batches).item())
        found["before"] += _copies(model)
        found["curve"].append(engine.update(1e-2).grad_norm.item())
        found["after"] += _copies(model)
        if step == 1:
            with torch.no_grad():
                model(batches[0].inputs_BS, batches[0].targets_BS)  # as an evaluation: leaves copies behind
            for shard in engine.shards():
                shard.values.mul_(0.5)
            engine.loaded(step)
            found["after"] += _copies(model)
    return found


def _compare(ranks: int, tensor_parallel_size: int, precision: str) -> None:
    plain = run_ranks(_train, ranks, tensor_parallel_size, 1, precision)
    copied = run_ranks(_train, ranks, tensor_parallel_size, 2, precision)
    for without, with_copy in zip(plain, copied, strict=True):
        assert with_copy["curve"] == without["curve"] == copied[0]["curve"]
        assert without["before"] == []
        assert set(with_copy["before"]) == {0.5} and len(with_copy["before"]) >= MATRICES * STEPS
        assert with_copy["after"] == [], "copies of weights that have changed since"


def test_copies_inside_two_nodes_of_two_ranks_change_no_bit():
    _compare(ranks=4, tensor_parallel_size=1, precision="bf16")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_copies_beside_tensor_parallelism_change_no_bit(precision: str):
    """Two nodes of four ranks: tensor-parallel pairs, and a copy on the two data-parallel ranks of each node."""
    _compare(ranks=8, tensor_parallel_size=2, precision=precision)
