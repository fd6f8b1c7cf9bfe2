"""What the engine over DeepSpeed does beside the arithmetic, which test_base.py and test_hpz.py check."""

import math
import warnings
from typing import Any

import pytest
import torch
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

from model.parallel.mesh import Axis, Mesh, make_mesh
from tests.ranks import run_ranks
from tests.trainer.rules import optimizer
from tests.trainer.tiny import Tiny, sequences, split
from trainer.config import ParallelConfig, TrainConfig
from trainer.engines.base import NO_HOOKS, StepHooks
from trainer.engines.deepspeed_internals import CPU_Accelerator, deepspeed
from trainer.engines.zero import Zero, deepspeed_config

CPU = torch.device("cpu")


def engine_of(stage: int, rule: Any, mesh: Mesh, precision: Any = "fp32", hooks: StepHooks = NO_HOOKS) -> Zero:
    """Two micro-batches per update."""
    model = Tiny(False, torch.bfloat16 if precision == "bf16" else torch.float32)
    train = TrainConfig(precision=precision, micro_batch_size=1, global_batch_size=2 * mesh.data.size)
    floors = {name: 0.02 for name, _ in model.named_parameters()}
    return Zero(model, ParallelConfig(zero_stage=stage), optimizer(name=rule), train, mesh, floors, hooks)  # type: ignore[arg-type]


def steps(engine: Zero, which: range, rank: int) -> None:
    for step in which:
        engine.accumulate(split(split(sequences(step), 2)[rank], 2))
        engine.update(1e-3)


def not_finite(rank: int, world_size: int) -> list[tuple[str, bool, bool, bool, float]]:
    """A step whose second micro-batch has a NaN gradient on rank 0: rule, skipped, values kept, moments decayed, norm."""
    warnings.filterwarnings("ignore")
    mesh, found = make_mesh(1, CPU), []
    for stage in (1, 2, 3):
        for rule, betas in (("tiger", [0.965]), ("adamw", [0.9, 0.95])):
            engine = engine_of(stage, rule, mesh, "bf16")
            steps(engine, range(2), rank)
            before = [(f.values.clone(), [moment.clone() for moment in f.state.values()]) for f in engine.fragments()]
            engine.model.poison = [1.0, math.nan] if rank == 0 else []
            engine.accumulate(split(split(sequences(2), 2)[rank], 2))
            result = engine.update(1e-3)
            kept = all(torch.equal(f.values, values) for f, (values, _) in zip(engine.fragments(), before, strict=True))
            decayed = all(
                torch.allclose(moment, beta * old, rtol=1e-6, atol=0)
                for f, (_, moments) in zip(engine.fragments(), before, strict=True)
                for moment, old, beta in zip(f.state.values(), moments, betas, strict=True)
            )
            found.append((f"{rule}, stage {stage}", bool(result.skipped), kept, decayed, float(result.grad_norm)))
            engine.close()
    return found


def test_a_nan_gradient_decays_the_momentum_once_and_leaves_the_weights_in_every_stage() -> None:
    for rank in run_ranks(not_finite, 2):
        for name, skipped, kept, decayed, norm in rank:
            assert (skipped, kept, decayed, math.isfinite(norm)) == (True, True, True, False), name


def left(rank: int, world_size: int) -> list[bool]:
    """Whether a step that was dropped between its micro-batches leaves everything as it was."""
    warnings.filterwarnings("ignore")
    mesh, found = make_mesh(1, CPU), []
    for stage in (1, 2, 3):
        answers = iter([False, False, True])  # between the two micro-batches of each step
        engine = engine_of(stage, "tiger", mesh, hooks=StepHooks(leave=answers.__next__))
        steps(engine, range(2), rank)
        before = [shard.values.clone() for shard in engine.shards()]
        loss = engine.accumulate(split(split(sequences(2), 2)[rank], 2))
        found.append(loss is None and all(map(torch.equal, before, (shard.values for shard in engine.shards()))))
        engine.close()
    return found


def test_a_step_dropped_between_micro_batches_changes_nothing() -> None:
    assert run_ranks(left, 2) == [[True] * 3] * 2


def held(rank: int, world_size: int) -> list[tuple[str, float, float, str]]:
    """What a rank says that it holds under each stage, in bytes per parameter and times the ranks."""
    warnings.filterwarnings("ignore")
    found = []
    for stage in (1, 2, 3):
        engine = engine_of(stage, "adamw", make_mesh(1, CPU), "bf16")
        size = sum(parameter.numel() for parameter in Tiny(False, torch.bfloat16).parameters())
        state = engine.training_state()
        found.append((engine.description, state.weights / size * world_size, state.others / size * world_size, state.what))
        engine.close()
    return found


def test_an_engine_says_what_it_holds() -> None:
    """2 bytes of weights, on every rank below stage 3; 12 of master and moments, divided among the ranks."""
    for stage, ranks in enumerate(zip(*run_ranks(held, 2), strict=True), start=1):
        names, weights, others, whats = zip(*ranks, strict=True)
        assert set(names) == {f"ZeRO {stage}"} and set(whats) == {"masters and optimizer state"}
        assert sum(weights) / 2 == (pytest.approx(2, rel=0.1) if stage == 3 else 4) and sum(others) / 2 == pytest.approx(12)


def test_other_stages_are_refused() -> None:
    with pytest.raises(ValueError, match=r"parallel.zero_stage = 4; legal: 1, 2, 3"):
        Zero(
            Tiny(False, torch.float32),
            ParallelConfig.model_construct(zero_stage=4),
            optimizer(),
            TrainConfig(),
            Mesh(),
            {},
        )  # type: ignore[arg-type]


def waits(rank: int, world_size: int) -> list[int]:
    """How often DeepSpeed waits for the device in the fourth and fifth step of each stage."""
    warnings.filterwarnings("ignore")
    mesh, found, calls = make_mesh(1, CPU), [], []
    CPU_Accelerator.synchronize = lambda self, device_index=None: calls.append(device_index)  # type: ignore[method-assign]
    for stage in (1, 2, 3):
        engine = engine_of(stage, "adamw", mesh)
        steps(engine, range(3), rank)
        calls.clear()
        steps(engine, range(3, 5), rank)
        found.append(len(calls))
        engine.close()
    return found


def test_deepspeed_does_not_wait_for_the_device_to_take_the_time() -> None:
    """Its throughput timer, on by default, does so twice per micro-batch: here eight times."""
    assert run_ranks(waits, 2) == [[0, 0, 0]] * 2


def probed(rank: int, world_size: int) -> tuple[bool, int]:
    """Whether importing DeepSpeed made it ask what it may compile here, and how often starting an engine did."""
    warnings.filterwarnings("ignore")
    imported, calls = "__compatible_ops__" in vars(deepspeed.ops), []
    deepspeed.ops._probe_compatible_ops = lambda: calls.append(1) or {}
    engine_of(1, "adamw", make_mesh(1, CPU)).close()
    return imported, len(calls)


def test_deepspeed_does_not_look_for_compilers() -> None:
    """It would in every process: 0.1 s, and 0.6 s where there are a GPU and nvcc, which its CUDA side needs for nothing."""
    assert run_ranks(probed, 1) == [(False, 0)]
    assert CUDA_Accelerator().create_op_builder("ShareMemCommBuilder") is None


@pytest.mark.parametrize(("device", "ranks", "overlaps"), [("cuda", 1, False), ("cuda", 2, True), ("cpu", 2, False)])
def test_collectives_are_overlapped_where_there_are_any(device: str, ranks: int, overlaps: bool) -> None:
    mesh = Mesh(replicas=Axis(ranks), device=torch.device(device))
    for stage in (1, 2, 3):
        settings = deepspeed_config(ParallelConfig(zero_stage=stage), TrainConfig(), mesh)["zero_optimization"]  # type: ignore[arg-type]
        assert (settings["overlap_comm"], settings["contiguous_gradients"]) == (overlaps, overlaps)
