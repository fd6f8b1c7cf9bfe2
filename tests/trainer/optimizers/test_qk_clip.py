"""QK-Clip under every engine and layout against one step of plain tensors in float64."""

import functools
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model.attention.kernels.reference import reference_attention
from model.config import ModelConfig
from model.decoder import Decoder
from model.initialization import initialise
from model.parallel.layers import serial_kit
from model.parallel.mesh import Mesh, make_kit, make_mesh
from model.positions.batch import TokenLayout
from model.positions.config import PositionConfig
from tests.combinations.optimizers import clip_logits
from tests.ranks import run_ranks
from tests.trainer.engines.test_base import LENGTH, SEQUENCES, Batch, floors, micro_batches, tokens
from tests.trainer.reference import Reference
from tests.trainer.rules import optimizer
from trainer.config import ParallelConfig, TrainConfig
from trainer.engines.fold import Fold
from trainer.engines.zero import Zero
from trainer.optimizers.config import OptimizerConfig

CPU, RATE = torch.device("cpu"), 1e-2
SIZES = {
    "vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "initializer_range": 0.4,
}  # fmt: skip
LATENT = {"attention": "mla", "kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
KINDS: dict[str, dict[str, Any]] = {
    "mha": {"attention_bias": "qkv"},
    "gqa": {"num_key_value_heads": 2, "attention_bias": "qkv"},
    "mqa": {"num_key_value_heads": 1},
    "mla": LATENT,
    "mla-lora": {**LATENT, "q_lora_rank": 10},
}
POSITION = PositionConfig(kind="rerope", window=5)
LIMITS = {"mha": 8.0, "gqa": 8.0, "mqa": 8.0, "mla": 7.0, "mla-lora": 5.6}
"""Above some heads and below others."""
Case = tuple[str, str, int]
"""Engine, kind of attention, micro-batches."""
LAYOUTS: dict[tuple[int, int], list[Case]] = {
    (1, 1): [("zero-1", "mha", 3), ("zero-3", "mla-lora", 1), ("fold", "mla", 3)],
    (2, 1): [("zero-1", "gqa", 3), ("zero-2", "mha", 1), ("zero-3", "mha", 3), ("fold", "mha", 1)],
    (2, 2): [("zero-1", "mqa", 1), ("zero-2", "mla", 3), ("zero-3", "mha", 1), ("fold", "mla-lora", 3)],
    (4, 2): [("zero-1", "mha", 3), ("zero-2", "mla-lora", 1), ("zero-3", "mla", 3), ("fold", "gqa", 1)],
}
"""World and tensor-parallel size."""


def settings_of(engine: str, limit: float | None) -> OptimizerConfig:
    name = "tiger" if engine == "fold" else "adamw"
    return optimizer(name, max_grad_norm=0.0).model_copy(update={"qk_clip": limit})


def network(kind: str, kit: Any) -> Decoder:
    """Initialised, with biases that are not zero."""
    model = Decoder(ModelConfig(**SIZES, **KINDS[kind]), POSITION, LENGTH, kit)
    initialise(model, 0)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.constant_(parameter, 0.3)
    return model


def engine_of(engine: str, kind: str, count: int, mesh: Mesh, limit: float | None) -> Zero | Fold:
    model, settings = network(kind, make_kit(mesh)), settings_of(engine, limit)
    if engine == "fold":
        return Fold(model, settings, mesh, seed=0, rms_floor=floors(model), bucket_numbers=2000)
    parallel = ParallelConfig(tensor_parallel_size=mesh.tensor.size, zero_stage=int(engine[-1]))  # type: ignore[arg-type]
    size = SEQUENCES // mesh.data.size // count
    train = TrainConfig(precision="fp32", micro_batch_size=size, global_batch_size=SEQUENCES)
    return Zero(model, parallel, settings, train, mesh, floors(model))


def one_step(_: int, world_size: int, tensor_parallel_size: int, cases: list[Case]) -> list[Any]:
    """Of each case: the largest logit, the heads clipped, and what this rank then holds."""
    warnings.filterwarnings("ignore")  # DeepSpeed's own
    mesh, found = make_mesh(tensor_parallel_size, CPU), []
    for engine, kind, count in cases:
        made = engine_of(engine, kind, count, mesh, LIMITS[kind])
        made.accumulate(micro_batches(0, mesh, count))
        with torch.no_grad():  # an evaluation between
            made.model(torch.arange(48).view(4, LENGTH))
        result = made.update(RATE)
        assert result.logit_bound is not None and result.heads_clipped is not None
        held = [(f.name, f.slice_shape, f.slice_start, f.offset, f.values.numpy().copy()) for f in made.fragments()]
        found.append((result.logit_bound.item(), result.heads_clipped.item(), held))
        made.close()
    return found


def largest_logits(model: Decoder, inputs_BS: Tensor) -> Tensor:
    """The largest log-sum-exp of a query, by the definition of attention, [L, N]."""
    positions = model.positions_for(TokenLayout(*inputs_BS.shape))
    x_TD, found = model.model.embed(inputs_BS.flatten()), []
    for block in model.blocks:
        layer = block.self_attn
        (part,) = layer.parts(*layer.project(block.attention_input(x_TD), positions), positions=positions)
        found.append(reference_attention(part.inputs, layer.scale, POSITION.window)[1].amax(dim=(0, 1)))
        x_TD = block(x_TD, positions)
    return torch.stack(found).detach()


@functools.cache
def wanted(engine: str, kind: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Largest logits, and the weights after one update and QK-Clip."""
    model, settings, batch = network(kind, serial_kit(torch.float64)), settings_of(engine, LIMITS[kind]), tokens(0)
    weights = dict(model.named_parameters())
    kinds = {name: weight.spec.kind for name, weight in weights.items()}  # type: ignore[attr-defined]
    reference = Reference({n: w.detach().clone() for n, w in weights.items()}, kinds, settings, floors(model))
    loss_sum, targets = model(batch.inputs_BS, batch.targets_BS)
    gradients = torch.autograd.grad(loss_sum / targets, list(weights.values()))
    largest_LN = largest_logits(model, batch.inputs_BS)
    reference.step(dict(zip(weights, gradients, strict=True)), RATE)
    clip_logits(SimpleNamespace(model=model.config, optimizer=settings), reference.values, largest_LN, lambda weight: weight)
    return largest_LN, reference.values


def compare(case: Case, ranks: list[Any]) -> None:
    largest_LN, values = wanted(case[0].rstrip("-123"), case[1])
    above = int((largest_LN > LIMITS[case[1]]).sum())
    assert 0 < above < largest_LN.numel(), largest_LN
    covered = {name: np.zeros(value.shape, bool) for name, value in values.items()}
    for largest, clipped, held in ranks:
        assert largest == pytest.approx(largest_LN.max().item(), rel=1e-5) and clipped == above
        for name, shape, begin, offset, got in held:
            place = tuple(slice(first, first + length) for first, length in zip(begin, shape, strict=True))
            part = slice(offset, offset + got.size)
            np.testing.assert_allclose(
                got, values[name][place].reshape(-1)[part].numpy(), rtol=1e-5, atol=1e-5, err_msg=f"{case} {name}"
            )
            index = np.arange(covered[name].size).reshape(covered[name].shape)[place].reshape(-1)[part]
            covered[name].reshape(-1)[index] = True
    assert all(mask.all() for mask in covered.values())


@pytest.mark.parametrize(("world_size", "tensor_parallel_size"), LAYOUTS)
def test_a_step_is_that_of_plain_tensors(world_size: int, tensor_parallel_size: int) -> None:
    cases = LAYOUTS[world_size, tensor_parallel_size]
    ranks = run_ranks(one_step, world_size, tensor_parallel_size, cases, timeout_seconds=280)
    for index, case in enumerate(cases):
        compare(case, [rank[index] for rank in ranks])


def folded(limit: float | None, steps: int = 3, dtype: torch.dtype = torch.bfloat16) -> Fold:
    model, settings = network("mha", serial_kit(dtype)), settings_of("fold", limit)
    engine = Fold(model, settings, Mesh(), seed=0, rms_floor=floors(model), bucket_numbers=2000)
    train(engine, range(steps))
    return engine


def train(engine: Fold, steps: range) -> None:
    for step in steps:
        engine.accumulate(micro_batches(step, Mesh(), 3))
        engine.update(RATE)


def weights_of(engine: Fold) -> list[Tensor]:
    return [fragment.values.clone() for fragment in engine.fragments()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_limit_that_no_head_reaches_changes_no_bit(dtype: torch.dtype) -> None:
    without = weights_of(folded(None, dtype=dtype))
    assert same(weights_of(folded(1e9, dtype=dtype)), without)
    assert not same(weights_of(folded(4.0, dtype=dtype)), without)


def test_a_resumed_run_is_the_unbroken_one_bit_for_bit() -> None:
    begun = folded(4.0, steps=2)
    saved = {shard.name: shard.values.clone() for shard in begun.shards()}
    train(begun, range(2, 4))
    other = folded(4.0, steps=1)
    for shard in other.shards():
        shard.values.copy_(saved[shard.name])
    other.loaded(2)
    train(other, range(2, 4))
    assert same(weights_of(other), weights_of(begun))


def test_stochastic_rounding_keeps_the_factor_on_average() -> None:
    """To nearest, the 8 bits of bfloat16 would give all elements of a value the same error."""
    engine = folded(4.0, steps=0)
    fragment = next(f for f in engine.fragments() if f.name.endswith("layers.0.self_attn.q_proj.weight"))
    factor_R = torch.full((fragment.shape[0],), 0.9987, dtype=torch.float64)
    means = []
    for step in range(40):
        fragment.values.fill_(1.0)
        engine.steps_done = step
        engine._scale_rows({fragment.name: factor_R}, False)
        means.append(fragment.values.double().mean().item())
    assert sum(means) / len(means) == pytest.approx(0.9987, abs=1e-4)


@pytest.mark.parametrize("what", ["left out", "a loss that is no number"])
def test_a_step_that_is_left_out_is_not_clipped(what: str) -> None:
    engine = folded(4.0, steps=0)
    if what != "left out":
        engine.model.model.norm.weight.data[0] = torch.nan
    before = weights_of(engine)
    engine.accumulate(micro_batches(0, Mesh(), 1))
    result = engine.update(RATE, skip=what == "left out")
    assert all(torch.equal(a, b) or a.isnan().any() for a, b in zip(weights_of(engine), before, strict=True))
    assert result.logit_bound is not None and result.logit_bound.item() > 4.0
    assert result.heads_clipped is not None and result.heads_clipped.item() == 0 and result.skipped
    assert set(result.logit_record()) == {"logit_bound", "heads_clipped"}


def test_each_step_begins_anew_and_its_largest_micro_batch_counts() -> None:
    engine, reference = folded(1e9, steps=0, dtype=torch.float32), network("mha", serial_kit(torch.float64))
    for step in range(3):
        batches = micro_batches(step, Mesh(), 3)
        each = [largest_logits(reference, batch.inputs_BS).max().item() for batch in batches]
        engine.accumulate(batches)
        largest = engine._logits.largest
        assert largest is not None and largest.item() == pytest.approx(max(each), rel=1e-6)
    quiet = Batch(torch.zeros(1, LENGTH, dtype=torch.long), torch.zeros(1, LENGTH, dtype=torch.long))
    engine.accumulate([quiet])
    after = engine._logits.largest
    assert after is not None and after.item() == pytest.approx(
        largest_logits(reference, quiet.inputs_BS).max().item(), rel=1e-6
    )
    assert after.item() < largest.item()


def test_without_a_limit_nothing_is_recorded() -> None:
    engine = folded(None, steps=1)
    engine.accumulate(micro_batches(1, Mesh(), 1))
    assert all(block.self_attn.largest_logit_n is None for block in engine.model.blocks)
    assert engine.update(RATE).logit_record() == {}
