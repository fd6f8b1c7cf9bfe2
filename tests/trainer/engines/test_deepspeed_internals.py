"""Private interfaces of DeepSpeed do, on the installed DeepSpeed, what tiglon needs; one that changes is one sentence."""

import inspect
import re
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Any

import pytest
import torch

from model.parallel.mesh import make_mesh
from tests.ranks import run_ranks
from tests.trainer.rules import optimizer
from tests.trainer.tiny import Tiny, sequences
from trainer.config import ParallelConfig, TrainConfig
from trainer.engines import deepspeed_internals as internals
from trainer.engines.deepspeed_internals import (
    PRIVATE_ATTRIBUTES,
    copy_masters_to_weights,
    deepspeed,
    flat_positions,
    intra_node_group,
    leave_gradients_alone,
    master_slices,
    weight_bytes,
)
from trainer.engines.zero import Zero
from trainer.private_api import private_api_changed

CPU = torch.device("cpu")
FORMS: dict[str, tuple[int, Any, int]] = {
    "zero-1": (1, "fp32", 1),
    "zero-1-bf16-sums": (1, "bf16", 2),
    "zero-2": (2, "bf16", 1),
    "zero-3": (3, "bf16", 2),
}
"""Stage, precision and micro-batches: each class of DeepSpeed's optimizers, and what it keeps its masters in."""
OWNERS = {
    "zero-1": (
        "round_robin_bit16_groups", "round_robin_bit16_offsets", "single_partition_of_fp32_groups", "update_lp_params",
        "_grad_acc_hooks",
    ),
    "zero-1-bf16-sums": ("bf16_groups", "fp32_groups_flat_partition", "update_lp_params"),
    "zero-3": (
        "fp16_groups", "fp32_partitioned_groups_flat", "_partition_all_parameters",
        "_reassign_or_swap_out_partitioned_parameters", "invalidate_secondary_tensor", "persistent_parameters",
    ),
}  # fmt: skip
"""Attributes of the optimizer by the form that has them."""


def engine_of(form: str, mesh: Any) -> Zero:
    stage, precision, count = FORMS[form]
    train = TrainConfig(precision=precision, micro_batch_size=1, global_batch_size=2 * count)
    parallel = ParallelConfig(zero_stage=stage)  # type: ignore[arg-type]
    return Zero(tiny(form), parallel, optimizer(name="adamw"), train, mesh, {})


class Without:
    """An object without one attribute: DeepSpeed after a release that has renamed it."""

    def __init__(self, whole: Any, name: str):
        self._whole, self._name = whole, name

    def __getattr__(self, name: str) -> Any:
        if name == self._name:
            raise AttributeError(name)
        return getattr(self._whole, name)


def sentence_of(act: Callable[[], Any]) -> str:
    try:
        act()
    except RuntimeError as error:
        return str(error)
    return ""


def tiny(form: str) -> Tiny:
    return Tiny(False, torch.float32 if FORMS[form][1] == "fp32" else torch.bfloat16)


def checked(rank: int, world_size: int, form: str) -> dict[str, Any]:
    """Whether masters lie where master_slices says and reach the weights, and what a missing attribute raises."""
    warnings.filterwarnings("ignore")
    engine = engine_of(form, make_mesh(1, CPU))
    found: dict[str, Any] = {"located": True, "bytes": weight_bytes(engine.model), "sentences": {}}
    whole = {name: weight.detach().float().reshape(-1) for name, weight in tiny(form).named_parameters()}
    slices = master_slices(engine.zero, engine.stage, rank)
    found["held"] = [(engine.names[id(part.parameter)], part.length) for part in slices]
    for part in slices:
        wanted = whole[engine.names[id(part.parameter)]][part.offset : part.offset + part.length]
        found["located"] &= torch.equal(part.of(part.flat), wanted)
        part.of(part.flat).fill_(0.5)
    copy_masters_to_weights(engine.zero, engine.stage)
    found["copied"] = all(bool((weight == 0.5).all()) for weight in engine.model.parameters())
    for name in OWNERS.get(form, ()):
        broken = type(type(engine.zero).__name__, (Without,), {})(engine.zero, name)
        uses = (
            partial(master_slices, broken, engine.stage, rank), partial(copy_masters_to_weights, broken, engine.stage),
            partial(leave_gradients_alone, broken),
        )  # fmt: skip
        found["sentences"][name] = next(filter(None, map(sentence_of, uses)), "")
    engine.close()
    return found


@pytest.mark.parametrize("form", FORMS)
def test_masters_lie_where_they_are_looked_for_and_reach_the_weights(form: str) -> None:
    ranks = run_ranks(checked, 2, form)
    names = ", ".join(OWNERS.get(form, OWNERS["zero-1"]))
    sizes = {name: weight.numel() for name, weight in tiny(form).named_parameters()}
    elements = sum(-(-size // 2) if form == "zero-3" else size for size in sizes.values())
    held = Counter()
    for rank in ranks:
        assert rank["located"], private_api_changed("deepspeed", f"one of {names}", "locating each parameter in the masters")
        assert rank["copied"], private_api_changed("deepspeed", f"one of {names}", "copying the masters into the weights")
        size = elements * (4 if FORMS[form][1] == "fp32" else 2)
        assert rank["bytes"] == size, private_api_changed("deepspeed", "parameter.ds_tensor", "the size of the weights")
        for name, length in rank["held"]:
            held[name] += length
        for name, text in rank["sentences"].items():
            sentence = rf"deepspeed {re.escape(version('deepspeed'))}: \w+\.{name}, which (.+) relies on, is missing [^\n]+"
            assert (match := re.fullmatch(sentence, text)) and match[1] == PRIVATE_ATTRIBUTES[name], (name, text)
    assert held == sizes, private_api_changed("deepspeed", f"one of {names}", "locating each parameter in the masters")


def test_every_private_attribute_has_a_planted_fault() -> None:
    planted = {name for names in OWNERS.values() for name in names}
    assert set(PRIVATE_ATTRIBUTES) - planted == {
        "ds_tensor",
        "ds_numel",
        "grad",
        "all_gather",
        "_ZERO_PARAM_INTRA_PARALLEL_GROUP",
    }
    parameter = torch.nn.Parameter(torch.zeros(2))
    for act, name in (
        (lambda: internals._stage3_slices([parameter], torch.zeros(2), 0), "ds_tensor"),
        (lambda: internals._stage3_slices([Without(_Partitioned(), "ds_numel")], torch.zeros(2), 0), "ds_numel"),
        (internals.MasterSlice(parameter, 0, torch.zeros(2), 0, 2).gradient, "grad"),
    ):
        assert PRIVATE_ATTRIBUTES[name] in sentence_of(act), private_api_changed("deepspeed", name, PRIVATE_ATTRIBUTES[name])


def without_hooks(rank: int, world_size: int, form: str) -> dict[str, Any]:
    """Where parameters lie in the flat weights, the elements of a part, and what backwards leave once the hooks are gone."""
    warnings.filterwarnings("ignore")
    engine = engine_of(form, make_mesh(1, CPU))
    positions, part = flat_positions(engine.zero)
    slices = master_slices(engine.zero, engine.stage, rank)
    places = {p.parameter: rank * part + p.position - p.offset for p in slices if p.length}
    batch, taken = sequences(rank), []
    engine.zero.process_gradients = lambda *arguments: taken.append(1)
    calls = []
    for _ in range(2):  # with DeepSpeed's hooks, then without
        engine.model.zero_grad()
        for _ in range(2):
            engine.model(batch.inputs_BS, batch.targets_BS)[0].backward()
        calls.append(len(taken))
        leave_gradients_alone(engine.zero)
    got = {name: parameter.grad for name, parameter in engine.model.named_parameters()}
    engine.close()
    plain = tiny(form)
    for _ in range(2):
        plain(batch.inputs_BS, batch.targets_BS)[0].backward()
    same = [got[name] is not None and torch.equal(got[name], weight.grad) for name, weight in plain.named_parameters()]  # type: ignore[arg-type]
    agree = [positions[parameter] == place for parameter, place in places.items()]
    return {"same": all(same), "places": all(agree), "part": part, "parameters": len(positions), "calls": calls}


@pytest.mark.parametrize("form", ["zero-1", "zero-2"])
def test_a_backward_leaves_gradients_where_torch_does_once_the_hooks_are_gone(form: str) -> None:
    elements = sum(weight.numel() for weight in tiny(form).parameters())
    for found in run_ranks(without_hooks, 2, form):
        sentence = private_api_changed("deepspeed", "_grad_acc_hooks", PRIVATE_ATTRIBUTES["_grad_acc_hooks"])
        assert found["calls"] == ([0, 0] if form == "zero-1" else [8, 8]) and found["same"], sentence
        assert found["places"] and found["parameters"] == 4 and 2 * found["part"] >= elements, sentence


class _Partitioned:
    ds_tensor = type("Partition", (), {"ds_numel": 1})


def test_hpz_groups_are_replaced_inside_the_block_only(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = internals.deepspeed_groups
    before = groups._ZERO_PARAM_INTRA_PARALLEL_GROUP
    with pytest.raises(KeyError), intra_node_group("group"):
        sentence = private_api_changed("deepspeed", "groups._get_zero_param_intra_parallel_group", "hpZ")
        assert groups._get_zero_param_intra_parallel_group() == "group", sentence
        raise KeyError
    assert groups._ZERO_PARAM_INTRA_PARALLEL_GROUP is before
    monkeypatch.delattr(groups, "_ZERO_PARAM_INTRA_PARALLEL_GROUP")
    with pytest.raises(RuntimeError, match=r"deepspeed \S+: \S+\._ZERO_PARAM_INTRA_PARALLEL_GROUP, which .+hpZ"):
        intra_node_group(None).__enter__()


def left_alone(rank: int, world_size: int) -> list[bool]:
    warnings.filterwarnings("ignore")
    engine_of("zero-1", make_mesh(1, CPU)).close()
    backend = internals.deepspeed.comm.comm.cdb
    return ["__compatible_ops__" in vars(deepspeed.ops), getattr(backend, "shm_comm_op", None) is None]


def test_deepspeed_compiles_nothing_and_its_modules_are_as_before() -> None:
    assert run_ranks(left_alone, 1) == [[False, True]], private_api_changed(
        "deepspeed", "ops.__compatible_ops__", "starting without DeepSpeed's compiled collectives"
    )


def test_what_zero_passes_to_deepspeed_is_taken() -> None:
    for function, needed in (
        (deepspeed.init_distributed, {"dist_backend", "verbose"}),
        (deepspeed.initialize, {"model", "optimizer", "config", "mpu"}),
    ):
        for name in needed - set(inspect.signature(function).parameters):
            pytest.fail(private_api_changed("deepspeed", f"{function.__name__}({name})", "trainer/engines/zero.py"))
