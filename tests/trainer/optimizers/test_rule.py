"""The protocol of a rule, by one that uses all of it: states of every granularity, and a statistic of each kind."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from pydantic import Field
from torch import Tensor

from model.parallel.mesh import Mesh, make_mesh
from model.parameters import ONES, ParameterSpec, local_slice
from tests.ranks import run_ranks
from trainer.optimizers.config import OptimizerConfig
from trainer.optimizers.fragments import Fragment, fragment_of
from trainer.optimizers.rates import UpdateStep
from trainer.optimizers.rule import Block, Granularity, Statistic, UpdateRule, average_, fresh
from trainer.optimizers.step import Optimizer

OF_ROWS, OF_GRADIENT = Statistic("momentum", "row"), Statistic("gradient", "matrix")


class RowScaled(UpdateRule):
    """Momentum over the running RMS of its rows, the running mean of the gradient's RMS beside it."""

    learning_rate: float = Field(default=1e-2, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    states: ClassVar[Mapping[str, Granularity]] = {"momentum": "element", "row_square": "row", "size": "matrix"}

    def measures(self, kind: str) -> tuple[Statistic, ...]:
        return OF_ROWS, OF_GRADIENT

    def scalars(self, number: int, decays: bool = True, scale: Any = 1.0) -> dict[str, Any]:
        return {"keep": 0.9, "take": 0.1}

    @staticmethod
    def accumulate(state: dict[str, Tensor], gradient: Tensor, scalars: Mapping[str, Any]) -> None:
        average_(state["momentum"], gradient, scalars["keep"], scalars["take"])

    @staticmethod
    def accumulate_rows(
        state: dict[str, Tensor], measured: dict[Statistic, Tensor], scalars: Mapping[str, Any]
    ) -> None:  # fmt: skip
        average_(state["row_square"], measured[OF_ROWS].square(), 0.5, 0.5)
        average_(state["size"], measured[OF_GRADIENT], 0.5, 0.5)

    @staticmethod
    def direction(block: Block, scalars: Mapping[str, Any]) -> Tensor:
        return block.state["momentum"] / (block.state["row_square"].sqrt() + block.state["size"])


class WithRowScaled(OptimizerConfig):
    """As if the rule had its line."""

    rowscaled: RowScaled = Field(default=RowScaled(), description="The rule of this test.")


TENSORS = {
    "embed": ParameterSpec("embedding", (12, 5), 0), "row": ParameterSpec("matrix", (7, 8), 1),
    "gain": ParameterSpec("gain", (6,), None, ONES), "bias": ParameterSpec("bias", (8,), 0),
}  # fmt: skip
STEPS, BAD = 5, 3


def gradient(name: str, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    found = torch.randn(TENSORS[name].shape, generator=generator, dtype=torch.float64)
    return found * torch.nan if step == BAD and name == "gain" else found


def wanted() -> dict[str, tuple[Tensor, ...]]:
    """Values and states of whole tensors by the formulas."""
    found = {}
    for name, spec in TENSORS.items():
        p = torch.ones(spec.shape, dtype=torch.float64)
        m, v, s = torch.zeros_like(p), 0.0, 0.0
        for step in range(1, STEPS + 1):
            g = gradient(name, step)
            if step == BAD:
                m = 0.9 * m
                continue
            norm = math.sqrt(sum(gradient(other, step).square().sum().item() for other in TENSORS))
            g = g * min(1.0, 1.0 / (norm + 1e-6))
            m = 0.9 * m + 0.1 * g
            rows = m.square().mean(1, keepdim=True) if m.ndim > 1 else m.square().mean(0, keepdim=True)
            v, s = 0.5 * v + 0.5 * rows, 0.5 * s + 0.5 * g.square().mean().sqrt()
            decay = 0.0 if spec.kind in ("gain", "bias") else 0.1
            p = p - 1e-2 * (m / (v**0.5 + s) + decay * p)
        found[name] = (p, m, v, s)
    return found


def part(full: Tensor, spec: ParameterSpec, mesh: Mesh, partitioned: bool) -> tuple[int, Tensor]:
    shape, begin = local_slice(spec, mesh.tensor.size, mesh.tensor.rank)
    flat = full[tuple(slice(b, b + n) for b, n in zip(begin, shape, strict=True))].reshape(-1).clone()
    share = math.ceil(flat.numel() / mesh.data.size) if partitioned else flat.numel()
    offset = mesh.data.rank * share if partitioned else 0
    return offset, flat[offset : offset + share]


def check(mesh: Mesh, partitioned: bool) -> None:
    fragments: list[Fragment] = []
    for name, spec in TENSORS.items():
        ones = torch.ones(spec.shape, dtype=torch.float64)
        fragments.append(fragment_of(name, spec, mesh, *part(ones, spec, mesh, partitioned)))
    moves = Optimizer(WithRowScaled(name="rowscaled"), fragments, mesh, {}, partitioned)
    for step in range(1, STEPS + 1):
        for fragment in fragments:
            spec = TENSORS[fragment.name]
            fragment.gradient = part(gradient(fragment.name, step), spec, mesh, partitioned)[1]
        moves.update(UpdateStep(step, 1e-2))
    for fragment in fragments:
        p, m, v, s = wanted()[fragment.name]
        spec = TENSORS[fragment.name]
        for mine, full in ((fragment.values, p), (fragment.state["momentum"], m)):
            torch.testing.assert_close(mine, part(full, spec, mesh, partitioned)[1], rtol=1e-10, atol=1e-12)
        rows = v.reshape(-1)[fragment.rows.start : fragment.rows.stop]
        torch.testing.assert_close(fragment.state["row_square"], rows, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(fragment.state["size"], s, rtol=1e-10, atol=1e-12)


def on_ranks(rank: int, world_size: int, tensor_parallel_size: int, partitioned: bool) -> None:
    check(make_mesh(tensor_parallel_size, torch.device("cpu")), partitioned)


@pytest.mark.parametrize(
    ("world_size", "tensor_parallel_size", "partitioned"), [(1, 1, True), (3, 1, True), (2, 2, False), (4, 2, True)]
)
def test_states_of_every_granularity_are_those_of_whole_tensors(
    world_size: int, tensor_parallel_size: int, partitioned: bool
) -> None:
    if world_size == 1:
        check(Mesh(), partitioned)
    else:
        run_ranks(on_ranks, world_size, tensor_parallel_size, partitioned)


def test_statistics_come_in_the_dtype_of_the_states() -> None:
    """float32, as in training: an average of one dtype into another is an error."""
    spec = TENSORS["row"]
    ones = torch.ones(spec.shape).reshape(-1)
    fragment = fragment_of("row", spec, Mesh(), 0, ones, gradient("row", 1).float().reshape(-1))
    Optimizer(WithRowScaled(name="rowscaled"), [fragment], Mesh(), {}, True).update(UpdateStep(1, 1e-2))
    assert fragment.state["row_square"].dtype == torch.float32 and (fragment.state["row_square"] > 0).all()


def test_an_average_is_the_same_by_floats_and_by_tensors() -> None:
    generator = torch.Generator().manual_seed(0)
    state, gradient = torch.randn(2, 100, generator=generator, dtype=torch.float64)
    for keep, take in ((0.9, 1.0 - 0.9), (1.0, 0.1), (0.9, 0.03)):
        both = [state.clone(), state.clone()]
        average_(both[0], gradient, keep, take)
        average_(both[1], gradient, torch.tensor(keep, dtype=torch.float64), torch.tensor(take, dtype=torch.float64))
        for found in both:
            torch.testing.assert_close(found, keep * state + take * gradient, rtol=1e-13, atol=1e-15)


def test_a_direction_that_is_a_state_is_copied_before_it_is_destroyed() -> None:
    momentum, other = torch.ones(3), torch.ones(3)
    assert fresh(momentum, {"momentum": momentum}).data_ptr() != momentum.data_ptr()
    assert fresh(other, {"momentum": momentum}) is other
