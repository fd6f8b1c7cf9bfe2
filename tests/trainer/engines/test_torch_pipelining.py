"""torch's schedules do, on the installed torch, what tiglon needs: gradients, memory, errors; what changes is one sentence."""

import re
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.multiprocessing.reductions import StorageWeakRef

from model.parallel.mesh import make_mesh
from model.parallel.pipeline import PipelineParallel
from tests.ranks import run_ranks
from tests.trainer.engines.test_deepspeed_internals import Without, sentence_of
from trainer.config import ParallelConfig
from trainer.engines.torch_pipelining import PIPELINING_ATTRIBUTES, PipelineSchedule, StageHooks, pipelining_attribute
from trainer.private_api import private_api_changed

CPU, WIDTH = torch.device("cpu"), 64


class Stage(nn.Module):
    """tanh(x w) of the stream x, or for the first stage of what is given; the last one's result is a weighted sum.

    Args:
        received: is given the memory of every stream and gradient that other stages have sent.
    """

    def __init__(self, stage: int, stages: int, received: Callable[[str, int, Tensor], object]):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 2 + stage, WIDTH, dtype=torch.float64))
        self.stage, self.last, self.received = stage, stage + 1 == stages, received

    def forward(self, x: Tensor, *, given: Tensor, factor: float) -> Tensor:
        if self.stage:
            self.received("stream", self.stage, x)
        y = torch.tanh((x if self.stage else given) * self.weight)
        if self.last:
            return (y * factor).sum()
        y.register_hook(lambda gradient: self.received("gradient", self.stage, gradient))
        return y


def micro_batches(count: int) -> list[dict[str, Any]]:
    """A tensor and a number each: neither is cut from a whole batch."""
    drawn = torch.randn(count, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return [{"given": given, "factor": 1.0 + index} for index, given in enumerate(drawn)]


def wanted(stages: int, count: int) -> list[list[float]]:
    """Gradients of the weights of all stages, in one process."""
    modules = [Stage(stage, stages, lambda *_: None) for stage in range(stages)]
    for keywords in micro_batches(count):
        x = torch.empty(0)
        for module in modules:
            x = module(x, **keywords)
        x.backward()
    return [module.weight.grad.tolist() for module in modules]  # type: ignore[union-attr]


class Watch:
    """Counts, at the beginning and the end of every pass, what other stages have sent and is still there."""

    def __init__(self) -> None:
        self.memory: list[tuple[str, int, StorageWeakRef]] = []
        self.in_flight: dict[int, set[int]] = {}
        self.schedule: Any = None
        self.excess, self.most_buffers = 0, 0

    def received(self, kind: str, stage: int, tensor: Tensor) -> None:
        self.memory.append((kind, stage, StorageWeakRef(tensor.untyped_storage())))

    def hooks(self) -> StageHooks:
        return StageHooks(self.begun, self.looked, self.looked, self.over)

    def begun(self, stage: int, index: int) -> None:
        self.in_flight.setdefault(stage, set()).add(index)
        self.looked(stage, index)

    def over(self, stage: int, index: int) -> None:
        self.looked(stage, index)
        self.in_flight[stage].remove(index)

    def looked(self, *_: int) -> None:
        self.most_buffers = max(self.most_buffers, self.buffers())
        for own, flying in self.in_flight.items():
            streams, gradients = self.alive("stream", own), self.alive("gradient", own)
            self.excess = max(self.excess, streams - len(flying), gradients - 1)

    def alive(self, *which: Any) -> int:
        return sum(not memory.expired() for *of, memory in self.memory if (*of,) == which)

    def buffers(self) -> int:
        """Memory that the stages of torch hold for what will be sent."""
        schedule = self.schedule._schedule
        infos = [each for s in getattr(schedule, "_stages", None) or [schedule._stage] for each in all_infos(s)]
        return sum(info.buffer is not None for info in infos)


def all_infos(stage: Any) -> Iterator[Any]:
    for infos in (*stage.args_recv_info.values(), *stage.grad_recv_info.values()):
        yield from infos


def passes(rank: int, world_size: int, kind: str, stages: int, counts: list[int]) -> list[dict[str, Any]]:
    """By number of micro-batches: this rank's gradients after two updates, and what the watch has seen."""
    mesh, found = make_mesh(1, CPU, pipeline_parallel_size=world_size), []
    pipeline = PipelineParallel(world_size, rank, mesh.pipeline.group, tuple(range(stages + 1)))
    stream = torch.empty(WIDTH, dtype=torch.float64, device="meta", requires_grad=True)
    for count in counts:
        watch = Watch()
        modules = {stage: Stage(stage, stages, watch.received) for stage in pipeline.own}
        watch.schedule = PipelineSchedule(kind, modules, pipeline, stream, count, watch.hooks(), CPU)
        for _ in range(2):
            for module in modules.values():
                module.weight.grad = None
            watch.schedule.run(micro_batches(count))
        gradients = {stage: module.weight.grad.tolist() for stage, module in modules.items()}  # type: ignore[union-attr]
        left = sum(not memory.expired() for *_, memory in watch.memory) + watch.buffers()
        seen = len(watch.memory) - 2 * count * sum((stage > 0) + (stage + 1 < stages) for stage in modules)
        found.append(
            {"gradients": gradients, "left": left, "excess": watch.excess, "buffers": watch.most_buffers, "seen": seen}
        )
    return found


@pytest.mark.parametrize(
    ("ranks", "kind", "stages", "counts"),
    [
        (2, "interleaved", 4, [2, 3, 12]), (3, "1f1b", 3, [3, 10]),
        pytest.param(3, "interleaved", 6, [3, 4, 5, 6, 8, 9, 12], marks=pytest.mark.slow),
        pytest.param(2, "interleaved", 6, [2, 3, 4, 6, 8], marks=pytest.mark.slow),
        pytest.param(4, "1f1b", 4, [4, 5, 11], marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_gradients_are_those_of_one_process_and_no_stream_outlives_its_micro_batch(
    ranks: int, kind: Any, stages: int, counts: list[int]
):
    """Memory for what will come is made when it is received: for one stream or, interleaved, those of a round at most, where
    torch would make that of all micro-batches, there and back, before the first."""
    limit = 1 if kind == "1f1b" else 5
    parallel = ParallelConfig(pipeline_parallel_size=ranks, pipeline_schedule=kind)
    assert all(map(parallel.can_schedule, counts))
    by_rank = run_ranks(passes, ranks, kind, stages, counts)
    for index, count in enumerate(counts):
        want = wanted(stages, count)
        for found in (rank[index] for rank in by_rank):
            for stage, gradient in found["gradients"].items():
                assert gradient == want[stage], f"{count} micro-batches, stage {stage}"
            sentence = private_api_changed("torch", "PipelineStage", PIPELINING_ATTRIBUTES["args_recv_info"])
            assert (found["left"], found["seen"]) == (0, 0) and found["excess"] <= 0, sentence
            assert found["buffers"] <= limit, sentence


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return x.clone()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:  # type: ignore[override]
        raise KeyError("backward") from OSError("why")


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, *, fails: str) -> Tensor:
        match fails:
            case "value":
                raise ValueError("a sentence") from OSError("why")
            case "runtime":
                raise RuntimeError("a sentence of its own")
        return Failing.apply(self.weight)


def alone(modules: dict[int, nn.Module], kind: str = "1f1b") -> PipelineSchedule:
    pipeline = PipelineParallel(1, 0, dist.group.WORLD, tuple(range(len(modules) + 1)))
    stream = torch.empty(1, device="meta", requires_grad=True)
    nothing = StageHooks(*[lambda stage, index: None] * 4)
    return PipelineSchedule(kind, modules, pipeline, stream, 1, nothing, CPU)


def errors(rank: int, world_size: int) -> list[tuple[str, str, str, bool]]:
    """Type, text and cause of what comes out of a stage, and whether its traceback leads into the stage."""
    found = []
    for fails in ("value", "runtime", "backward"):
        try:
            alone({0: Broken()}).run([{"fails": fails}])
        except Exception as error:
            frames, names = error.__traceback__, []
            while frames is not None:
                names.append(frames.tb_frame.f_code.co_filename)
                frames = frames.tb_next
            found.append((type(error).__name__, str(error), repr(error.__cause__), names[-1] == __file__))
    return found


def test_what_a_stage_raises_arrives_as_it_is():
    assert run_ranks(errors, 1) == [[
        ("ValueError", "a sentence", "OSError('why')", True), ("RuntimeError", "a sentence of its own", "None", True),
        ("KeyError", "'backward'", "OSError('why')", True),
    ]]  # fmt: skip


def unknown(rank: int, world_size: int) -> str:
    with pytest.raises(ValueError) as caught:
        alone({0: Broken()}, "zero-bubble")
    return str(caught.value)


def test_an_unknown_schedule_is_refused():
    assert run_ranks(unknown, 1) == ["parallel.pipeline_schedule = 'zero-bubble'; legal: 1f1b, interleaved"]


def missing(rank: int, world_size: int) -> dict[str, str]:
    """By attribute, what is said where a stage or schedule of torch has it no longer."""
    two: dict[int, nn.Module] = {0: Broken(), 1: Broken()}
    stages, schedule = alone(two, "interleaved")._schedule._stages, alone({0: Broken()})
    found = {
        name: sentence_of(lambda name=name: pipelining_attribute(Without(stages[0], name), name))
        for name in PIPELINING_ATTRIBUTES
    }
    schedule._schedule = Without(schedule._schedule, "_step_microbatches")
    found["run"] = sentence_of(lambda: schedule.run([{"fails": ""}]))
    for name, act in (("args_recv_info", stages[1].get_fwd_recv_ops), ("grad_recv_info", stages[0].get_bwd_recv_ops)):
        delattr(stages[0], name), delattr(stages[1], name)
        found[f"{name} of a stage"] = sentence_of(lambda act=act: act(0))
    return found


def test_a_private_attribute_that_is_gone_is_one_sentence():
    (found,) = run_ranks(missing, 1)
    assert len(found) == len(PIPELINING_ATTRIBUTES) + 3
    for case, text in found.items():
        name = "_step_microbatches" if case == "run" else case.partition(" ")[0]
        sentence = rf"torch {re.escape(version('torch'))}: \w+\.{name}, which (.+) relies on, is missing [^\n]+"
        assert (match := re.fullmatch(sentence, text)) and match[1] == PIPELINING_ATTRIBUTES[name], (case, text)


@pytest.mark.parametrize("name", ["_prepare_forward_infra", "_setup_backward_recv_info"])
def test_torch_has_the_methods_that_are_extended(name: str):
    assert callable(getattr(PipelineStage, name, None)), private_api_changed("torch", name, PIPELINING_ATTRIBUTES[name])
