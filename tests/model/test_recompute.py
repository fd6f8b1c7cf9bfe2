"""Selective recomputation: what it saves and what it relies on of torch; and gradients of every parameter under recomputation,
layout, engine, precision and compilation, against plain torch.

The weights are large (0.1): at 0.02 a gradient that is 19 % wrong moves the norm of all gradients by 1e-4 only.
"""

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from launch.config import RunConfig
from launch.engine import make_engine
from launch.load_config import build_config
from model.parallel.mesh import make_mesh
from model.recompute import detach_beneath_autograd, is_saved, selective_contexts, version_of
from tests.combinations.network import Batch, gradients
from tests.combinations.weights import initial_weights
from tests.model.libraries import relied_on
from tests.ranks import run_ranks
from trainer.engines.base import Engine
from trainer.engines.zero import Zero
from trainer.optimizers.step import UpdateResult


class CountProducts(TorchDispatchMode):
    """Counts matrix products and sums that are executed."""

    def __init__(self) -> None:
        super().__init__()
        self.executed: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.executed[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def products_are_saved_and_the_rest_is_recomputed() -> None:
    use = "model.recompute recognises the operations by their names and skips them in the recomputation"
    with relied_on("torch", "str() of an operator under torch.utils._python_dispatch.TorchDispatchMode", use):
        x, weight = (torch.randn(4, 4, dtype=torch.float64).requires_grad_() for _ in range(2))
        out = checkpoint(lambda h: (h @ weight).sin().exp().sum(), x, use_reentrant=False, context_fn=selective_contexts)
        assert isinstance(out, torch.Tensor)
        with CountProducts() as count:
            out.backward()
        assert count.executed["mm"] == 2, "the backward has one product per operand"
        assert count.executed["sin"] == 1, "sin is recomputed"
        wanted = torch.autograd.grad((x @ weight).sin().exp().sum(), (x, weight))
        assert x.grad is not None and torch.equal(x.grad, wanted[0])


def changes_in_place_are_counted() -> None:
    use = "model.recompute refuses a saved result that was changed in place"
    with relied_on("torch", "Tensor._version beneath torch._C._SetExcludeDispatchKeyGuard", use):
        seen = []

        class Detach(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                out = func(*args, **(kwargs or {}))
                seen.append(detach_beneath_autograd(out))
                return out

        with Detach():
            x = torch.ones(3, requires_grad=True) * 2
        before = version_of(seen[-1])
        x.detach().add_(1)
        assert version_of(seen[-1]) > before


@pytest.mark.parametrize("check", [products_are_saved_and_the_rest_is_recomputed, changes_in_place_are_counted])
def test_torch_has_what_recomputation_relies_on(check):
    check()


def test_a_torch_with_other_names_of_operators_is_seen(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch._ops.OpOverload, "__str__", lambda operator: operator.overloadpacket.__name__)
    with pytest.raises(pytest.fail.Exception, match=r"^torch [\w.+]+: str\(\) of an operator .* no longer .*$"):
        products_are_saved_and_the_rest_is_recomputed()


@pytest.mark.parametrize(
    "owner, name, planted",
    [(torch.Tensor, "_version", property(lambda x: 0)), (torch._C, "_SetExcludeDispatchKeyGuard", lambda *_: nullcontext())],
    ids=["no versions", "no guard"],
)
def test_a_torch_that_counts_no_changes_is_seen(owner, name, planted, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(owner, name, planted, raising=False)
    with pytest.raises(pytest.fail.Exception, match=r"^torch [\w.+]+: Tensor._version .* no longer .*model\.recompute.*$"):
        changes_in_place_are_counted()


def test_matrix_products_and_attention_are_saved():
    aten = torch.ops.aten
    saved = [aten.mm.default, aten.addmm.default, aten.bmm.default, aten._scaled_dot_product_flash_attention_for_cpu.default]
    assert all(map(is_saved, saved)) and not any(map(is_saved, [aten.mul.Tensor, aten.silu.default, aten.rsqrt.default]))


def test_a_saved_result_that_changed_in_place_is_refused():
    x, weight = (torch.randn(4, 4).requires_grad_() for _ in range(2))
    products = []

    def product(h: torch.Tensor) -> torch.Tensor:
        products.append(h @ weight)
        return products[-1].sin()

    out = checkpoint(product, x, use_reentrant=False, context_fn=selective_contexts)
    assert isinstance(out, torch.Tensor)
    products[0].detach().zero_()
    with pytest.raises(RuntimeError, match="a result saved for recomputation was changed in place"):
        out.sum().backward()


BETA = 0.9
ENGINES = ("zero 1", "zero 2", "zero 3", "fold")
RECOMPUTE = ("none", "selective", "full")
ATTENTION: dict[str, dict[str, Any]] = {
    "gqa": {"num_key_value_heads": 2},
    "mla": {
        "attention": "mla", "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    },
    "all heads normed": {
        "num_key_value_heads": 2, "qk_norm": "rms-all-heads", "norm_placement": "post", "zero_centered_gains": True,
        "attention_bias": "all", "mlp_bias": True,
    },
}  # fmt: skip
LAYOUTS = {"tensor 1": (1, False), "tensor 2": (2, False), "tensor 2, sequence": (2, True)}
ROWS, LENGTH, VOCABULARY = 4, 32, 96

Case = tuple[str, str, str, str]
"""Recomputation, attention, engine, precision."""
RankGradients = dict[str, list[tuple[tuple[int, ...], tuple[int, ...], int, np.ndarray]]]
"""Name -> (slice_start, slice_shape, offset, flat gradient) of what a rank holds."""


def configuration(case: Case, tensor: int, sequence: bool, compiled: bool) -> RunConfig:
    recompute, attention, engine, precision = case
    zero = {"engine": "fold"} if engine == "fold" else {"zero_stage": int(engine[-1])}
    return build_config(
        {
            "model": {
                "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                "num_attention_heads": 4, "initializer_range": 0.1, **ATTENTION[attention],
            },
            "train": {
                "precision": precision, "sequence_length": LENGTH, "global_batch_size": ROWS, "micro_batch_size": 2,
                "recompute": recompute, "compile": compiled,
            },
            "optimizer": {"tiger": {"beta": BETA}, "max_grad_norm": 0.0, "compile": False},
            "parallel": {**zero, "tensor_parallel_size": tensor, "sequence_parallel": sequence},
        }
    )  # fmt: skip


def batches() -> list[Batch]:
    tokens = torch.randint(0, VOCABULARY, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    return [(part[:, :-1].contiguous(), part[:, 1:].contiguous(), None) for part in tokens.split(2)]


def rank_gradients(rank: int, world_size: int, cases: Sequence[Case], layout: str, compiled: bool) -> list[RankGradients]:
    """What this rank's engine has of the gradients of one update, case after case."""
    tensor, sequence = LAYOUTS[layout]
    mesh = make_mesh(tensor, torch.device("cpu"))
    micro_batches = [SimpleNamespace(inputs_BS=i, targets_BS=t, cu_seqlens=b) for i, t, b in batches()]
    gradients_of_cases = []
    for case in cases:
        torch._dynamo.reset()
        engine = make_engine(configuration(case, tensor, sequence, compiled), mesh)
        engine.accumulate(micro_batches)
        gradients_of_cases.append(engine_gradients(engine))
        engine.close()
    return gradients_of_cases


def engine_gradients(engine: Engine) -> RankGradients:
    slices: RankGradients = {}

    def take(_: Any = None) -> UpdateResult:
        for f in engine.fragments():
            flat = f.gradient if f.gradient is not None else f.state["momentum"] / (1 - BETA)
            entry = (f.slice_start, f.slice_shape, f.offset, flat.float().numpy().copy())
            slices.setdefault(f.name, []).append(entry)
        return UpdateResult(torch.zeros(()), torch.zeros((), dtype=torch.bool))

    if isinstance(engine, Zero):
        engine.optimizer.update = take  # type: ignore[method-assign]
        engine.update(0.0)
    else:
        take()
    return slices


def joined(ranks: list[RankGradients], shapes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    """Full gradients; NaN where no rank had any."""
    whole = {name: torch.full(shape, torch.nan) for name, shape in shapes.items()}
    for slices in ranks:
        for name, entries in slices.items():
            for start, shape, offset, flat in entries:
                part = whole[name]
                for dimension, (first, length) in enumerate(zip(start, shape, strict=True)):
                    part = part.narrow(dimension, first, length)
                copy = part.reshape(-1).clone()
                copy[offset : offset + flat.size] = torch.from_numpy(flat)
                part.copy_(copy.view(shape))
    return whole


def check_cases(cases: Sequence[Case], layout: str, compiled: bool) -> None:
    tensor, sequence = LAYOUTS[layout]
    ranks = run_ranks(rank_gradients, tensor, cases, layout, compiled, timeout_seconds=280)
    wrong, truths = [], {}
    for index, case in enumerate(cases):
        config, key = configuration(case, tensor, sequence, compiled), (case[1], case[3])
        if key not in truths:
            weights = initial_weights(config)
            truth = gradients(config, {n: w.double() for n, w in weights.items()}, batches(), torch.float64)[1]
            truths[key] = truth, gradients(config, weights, batches(), torch.bfloat16)[1]
        truth, narrow = truths[key]
        got = joined([rank[index] for rank in ranks], {name: g.shape for name, g in truth.items()})
        for name, want in truth.items():
            allowed = 1e-5 if case[3] == "fp32" else 3 * distance(narrow[name], want) + 2e-3
            if not distance(got[name], want) <= allowed:
                wrong.append(f"{case} {name}: {distance(got[name], want):.2e}, allowed {allowed:.2e}")
    assert not wrong, f"{len(wrong)} gradients: " + "\n".join(wrong[:20])


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_selective_recomputation_has_the_gradients_of_none(layout: str):
    """Under tensor parallelism saved products were once reduced a second time: 19 % off, and no loss showed it."""
    check_cases([("selective", a, e, "fp32") for a in ATTENTION for e in ("zero 1", "zero 3", "fold")], layout, False)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_case_eager(layout: str):
    check_cases([(r, a, e, p) for r in RECOMPUTE for a in ATTENTION for e in ENGINES for p in ("fp32", "bf16")], layout, False)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_case_compiled(layout: str, attention: str, precision: str):
    cases = [(r, attention, e, precision) for r in RECOMPUTE for e in ENGINES if (r, e) != ("selective", "zero 3")]
    check_cases(cases, layout, True)
