"""A small network in stages, its batches of packed documents, and the same updates by plain formulas in float64."""

import functools
import math
import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from launch.config import RunConfig
from model.decoder import Decoder
from model.parallel.mesh import Mesh, make_kit, make_mesh
from model.parallel.pipeline import cut_evenly
from tests.combinations.cases import SIZES, VOCABULARY, S, configured, shaken
from tests.combinations.network import micro_gradients
from tests.combinations.weights import kind
from tests.trainer.reference import Reference
from tests.trainer.rules import optimizer
from tests.trainer.tiny import Batch
from trainer.config import ParallelConfig, TrainConfig
from trainer.engines.base import NO_HOOKS, StepHooks
from trainer.engines.fold_pipeline import FoldPipeline
from trainer.engines.zero_pipeline import ZeroPipeline

CPU, LAYERS, ROWS, STEPS = torch.device("cpu"), 4, 2, 3
HEADS: dict[str, dict[str, Any]] = {
    "plain": {"tied_head": "plain"}, "half-swap": {"num_key_value_heads": 2}, "projection": {"tied_head": "projection"},
    "untied": {"tie_word_embeddings": False, "norm_placement": "sandwich"},
}  # fmt: skip
RULES: dict[str, dict[str, Any]] = {  # with AdamW's own epsilon an element's step hangs on the last bits of a tiny gradient
    "adamw": {"name": "adamw", "learning_rate": 1e-3, "eps": 1e-5, "max_grad_norm": 0.5},
    "muon": {"name": "muon", "precision": "fp32", "learning_rate": 1e-2},
    "lion": {"name": "lion", "max_grad_norm": 0.5},
    "tiger": {"name": "tiger", "max_grad_norm": 0.0},
    "tiger-row": {"name": "tiger", "embedding_rms": "row", "max_grad_norm": 0.0},
    "muon-momentum": {"name": "muon", "precision": "fp32", "nesterov": False, "others": "tiger", "max_grad_norm": 0.0},
}


@dataclass(frozen=True)
class Case:
    """One engine over stages."""

    engine: str
    rule: str
    head: str
    stages: int = 2
    micro_batches: int = 3
    bucket_elements: int = 2000


def configuration(head: str) -> RunConfig:
    return configured(model={**SIZES, "num_hidden_layers": LAYERS, **HEADS[head]})


def decoder(head: str, mesh: Mesh, stages: int, dtype: torch.dtype = torch.float32) -> Decoder:
    """A rank's stages with large weights, which are the same for every layout."""
    config, weights = configuration(head), shaken(configuration(head))
    bounds = cut_evenly([1.0] * LAYERS, stages) if mesh.pipeline.size > 1 else ()
    model = Decoder(config.model, config.position, S, make_kit(mesh, dtype=dtype, stage_bounds=bounds))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    return model


def micro_batch(step: int, number: int) -> Batch:
    """Two rows, of documents of their own lengths and with scored targets of their own number."""
    generator = torch.Generator().manual_seed(100 * step + number)
    ids = torch.randint(0, VOCABULARY, (ROWS, S + 1), generator=generator)
    inner = torch.randperm(ROWS * S, generator=generator)[: 2 + number % 3].tolist()
    boundaries = sorted({0, *(S * (row + 1) for row in range(ROWS)), *inner})
    targets = ids[:, 1:].clone()
    targets[0, : 3 * number % S] = -100
    return Batch(ids[:, :-1], targets, torch.tensor(boundaries, dtype=torch.int32))


def micro_batches(step: int, mesh: Mesh, count: int) -> list[Batch]:
    """Those of a data-parallel rank."""
    return [micro_batch(step, mesh.data.rank * count + index) for index in range(count)]


def engine_of(
    case: Case, mesh: Mesh, dtype: torch.dtype = torch.float32, hooks: StepHooks = NO_HOOKS, **more: Any
) -> ZeroPipeline | FoldPipeline:  # fmt: skip
    """More: keys of the optimizer that are not the rule's."""
    model, schedule = (
        decoder(case.head, mesh, case.stages, dtype),
        "1f1b" if case.stages == mesh.pipeline.size else "interleaved",
    )
    settings = optimizer(**RULES[case.rule]).model_copy(update=more)
    if case.engine == "fold":
        options = {"seed": 0, "rms_floor": floors(case.head), "bucket_numbers": case.bucket_elements, "hooks": hooks}
        return FoldPipeline(model, settings, mesh, schedule=schedule, **options)
    parallel = ParallelConfig(
        pipeline_parallel_size=mesh.pipeline.size, pipeline_schedule=schedule, zero_stage=int(case.engine[-1]),  # type: ignore[arg-type]
        reduce_bucket_elements=case.bucket_elements,
    )  # fmt: skip
    size = ROWS * case.micro_batches * mesh.data.size
    precision: Any = "fp32" if dtype == torch.float32 else "bf16"
    train = TrainConfig(precision=precision, micro_batch_size=ROWS, global_batch_size=size)
    return ZeroPipeline(model, parallel, settings, train, mesh, floors(case.head), hooks)


def floors(head: str) -> dict[str, float]:
    """Some of them above the RMS of their parameter."""
    return {name: 0.03 * (1 + index % 5) for index, name in enumerate(shaken(configuration(head)))}


def rate(rule: str) -> float:
    return optimizer(**RULES[rule]).rate


def holdings(engine: ZeroPipeline | FoldPipeline) -> list[tuple[str, int, np.ndarray, np.ndarray]]:
    """Name, first element, values and momentum of everything that a rank updates."""
    found = []
    for f in engine.fragments():
        found.append((f.name, f.offset, f.values.double().numpy().copy(), f.state["momentum"].double().numpy().copy()))
    return found


def run_case(case: Case, mesh: Mesh, **more: Any) -> dict[str, Any]:
    """A few updates; losses, norms, what this rank then holds, and the weights of its network."""
    engine, losses, norms = engine_of(case, mesh, **more), [], []
    for step in range(STEPS):
        losses.append(engine.accumulate(micro_batches(step, mesh, case.micro_batches)).item())
        norms.append(engine.update(rate(case.rule)).grad_norm.item())
    weights = {name: parameter.detach().double().numpy().copy() for name, parameter in engine.model.named_parameters()}
    no_gradients = all(parameter.grad is None for parameter in engine.model.parameters())
    found = {"losses": losses, "norms": norms, "held": holdings(engine), "weights": weights, "freed": no_gradients}
    engine.close()
    return found


def run_cases(rank: int, world_size: int, pipeline: int, cases: list[Case]) -> list[dict[str, Any]]:
    warnings.filterwarnings("ignore")  # DeepSpeed's own
    mesh = make_mesh(1, CPU, pipeline_parallel_size=pipeline)
    return [run_case(case, mesh) for case in cases]


@dataclass
class Wanted:
    """The same by plain formulas."""

    reference: Reference
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    unsure: dict[str, Tensor] = field(default_factory=dict)
    """Elements whose direction hung on a momentum within rounding of zero in some step."""


def plain(head: str) -> dict[str, Tensor]:
    return {name: weight.double() for name, weight in shaken(configuration(head)).items()}


@functools.cache
def wanted(rule: str, head: str, micro: int) -> Wanted:
    """After STEPS updates of `micro` micro-batches over all ranks."""
    config, settings, values = configuration(head), optimizer(**RULES[rule]), plain(head)
    reference = Reference(values, {name: kind(name) for name in values}, settings, floors(head))
    found = Wanted(reference, unsure={name: torch.zeros(w.shape, dtype=torch.bool) for name, w in values.items()})
    for step in range(STEPS):
        gradients: dict[str, Tensor] = {name: torch.zeros_like(weight) for name, weight in values.items()}
        loss, batches = 0.0, [micro_batch(step, number) for number in range(micro)]
        triples = [(batch.inputs_BS, batch.targets_BS, batch.cu_seqlens) for batch in batches]
        for part, own in micro_gradients(config, reference.values, triples, torch.float64):
            loss += part
            gradients = {name: gradients[name] + own[name] for name in gradients}
        found.losses.append(loss)
        found.norms.append(math.sqrt(sum(g.square().sum().item() for g in gradients.values())))
        before = {name: m.clone() for name, m in reference.m.items()}
        reference.step(gradients, settings.rate, clip=settings.clipping)
        for name, m in reference.m.items():
            tested = m if settings.name != "lion" else 0.95 * before.get(name, torch.zeros_like(m)) + 0.05 * gradients[name]
            found.unsure[name] |= (tested.abs() < 1e-4 * tested.square().mean().sqrt()) & tested.ne(0)
    return found


def compare(case: Case, ranks: list[dict[str, Any]], data: int) -> None:
    """Every parameter is held, once or by each replica; momenta to 2e-5 of the largest element, and weights that are sure."""
    goal = wanted(case.rule, case.head, case.micro_batches * data)
    covered = {name: np.zeros(value.numel(), int) for name, value in goal.reference.values.items()}
    for rank in ranks:
        np.testing.assert_allclose(rank["losses"], goal.losses, rtol=2e-6)
        if case.engine != "fold":
            np.testing.assert_allclose(rank["norms"], goal.norms, rtol=1e-5)
        assert rank["freed"]
        for name, offset, values, momentum in rank["held"]:
            part = slice(offset, offset + values.size)
            covered[name][part] += 1
            whole = goal.reference.m[name].flatten().numpy()
            np.testing.assert_allclose(momentum, whole[part], rtol=0, atol=2e-5 * np.abs(whole).max(), err_msg=f"of {name}")
        for name, values in rank["weights"].items():
            sure = ~goal.unsure[name].numpy()
            expected = goal.reference.values[name].numpy()
            np.testing.assert_allclose(values[sure], expected[sure], rtol=2e-5, atol=3e-6, err_msg=name)
    assert sum(int(unsure.sum()) for unsure in goal.unsure.values()) <= 5e-3 * sum(len(counts) for counts in covered.values())
    copies = data if case.engine == "fold" else 1
    assert all((counts == copies).all() for counts in covered.values()), "every element once"


def check(ranks: int, pipeline: int, cases: list[Case], run: Any, timeout_seconds: float = 280) -> None:
    """Run the cases on ranks of which `pipeline` have stages, and compare.

    Args:
        run: tests.ranks.run_ranks.
    """
    found = run(run_cases, ranks, pipeline, cases, timeout_seconds=timeout_seconds)
    for index, case in enumerate(cases):
        try:
            compare(case, [rank[index] for rank in found], ranks // pipeline)
        except AssertionError as error:
            raise AssertionError(f"{case} on {ranks} ranks, {pipeline} in a pipeline: {error}") from error
