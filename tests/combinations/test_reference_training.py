"""The reference's updates, schedules and loop against torch's AdamW, lion-pytorch and figures by hand."""

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.combinations.cases import SIZES, VOCABULARY, batch, configured, far, tokens
from tests.combinations.hugging_face import hugging_face, mean_loss
from tests.combinations.loop import ERROR, Result, beside, rounded, train
from tests.combinations.network import Batch, gradients
from tests.combinations.optimizers import State, Store, clipping, fold, norm, start, update
from tests.combinations.schedule import multiplier
from tests.combinations.weights import floors, initial_weights, shapes

Lion = pytest.importorskip("lion_pytorch").Lion


@pytest.mark.parametrize("rule", ["adamw", "lion"])
def test_three_clipped_updates_are_those_of_torch_and_lion_pytorch(rule: str):
    section = {"name": rule, "max_grad_norm": 0.3, rule: {"learning_rate": 0.01, "betas": [0.8, 0.9], "weight_decay": 0.5}}
    flat = {"kind": "constant", "warmup_steps": 0}
    config = configured(model={**SIZES, "tie_word_embeddings": False}, optimizer=section, schedule=flat)
    batches = [[batch(2 * n), batch(2 * n + 1)] for n in range(3)]
    theirs = hugging_face(config, initial_weights(config))
    exempt = [parameter for name, parameter in theirs.named_parameters() if "norm" in name]
    decayed = [parameter for name, parameter in theirs.named_parameters() if "norm" not in name]
    groups: Any = [{"params": decayed, "weight_decay": 0.5}, {"params": exempt, "weight_decay": 0.0}]
    package: Any = torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.9)) if rule == "adamw" else None
    package = package or Lion(groups, lr=0.01, betas=(0.8, 0.9))
    result = train(config, batches.__getitem__, 3)
    for record, micro in zip(result.records, batches, strict=True):
        loss = mean_loss(theirs, micro)
        package.zero_grad()
        loss.backward()
        size = nn.utils.clip_grad_norm_(theirs.parameters(), 0.3)
        package.step()
        assert (record.loss, record.grad_norm) == pytest.approx((loss.item(), float(size)), rel=1e-9)
        assert record.grad_norm > 0.3
    assert max(far(parameter.detach(), result.weights[name]) for name, parameter in theirs.named_parameters()) < 1e-9


NINE = {
    "constant": ({}, [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1, 1]),
    "linear": ({}, [1 / 3, 2 / 3, 1, 11 / 12, 10 / 12, 9 / 12, 8 / 12, 7 / 12, 0.5]),
    "linear, decay_steps 2": ({"decay_steps": 2}, [1 / 3, 2 / 3, 1, 0.75, 0.5, 0.5, 0.5, 0.5, 0.5]),
    "linear, no warm-up": ({"warmup_steps": 0}, [1 - n / 16 for n in range(9)]),
    "cosine": ({}, [1 / 3, 2 / 3, 1, *(0.75 + 0.25 * math.cos(math.pi * n / 6) for n in range(1, 6)), 0.5]),
    "warmup-stable-decay": ({"decay_steps": 4}, [1 / 3, 2 / 3, 1, 1, 1, 0.875, 0.75, 0.625, 0.5]),
    "warmup-stable-decay, a fifth": ({}, [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1, 0.5]),
    "piecewise": ({"points": [(2, 1.0), (6, 0.5)]}, [0.5, 1, 0.875, 0.75, 0.625, 0.5, 0.5, 0.5, 0.5]),
}


@pytest.mark.parametrize("name", NINE)
def test_multipliers_of_nine_updates(name: str):
    keys, want = NINE[name]
    section = {"kind": name.split(",")[0], "warmup_steps": 3, "final_fraction": 0.5, **keys}
    schedule = configured(schedule=section).schedule
    got = [multiplier(schedule, n, 9) for n in range(1, 10)]
    assert got == pytest.approx(want, rel=1e-15)
    if name not in ("constant", "piecewise"):
        assert got[-1] == 0.5 and (got.count(1.0) == 1 or "stable" in name)


def one_update(section: dict[str, Any], gradient: float = 1.0, **rules: Any) -> State:
    """A first update of a matrix, the embedding and a gain, all by gradients +1, -1, ...; the first row was seen."""
    config = configured(
        model={**SIZES, "tie_word_embeddings": False}, optimizer={"max_grad_norm": 0, "tiger": section, "rules": rules}
    )
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    weights = {"matrix": rows, "model.embed_tokens.weight": rows, "a_norm": torch.tensor([2.0, 1.0], dtype=torch.float64)}
    signs = torch.tensor([[1.0, -1.0], [1.0, 1.0]], dtype=torch.float64)
    found = {"matrix": signs, "model.embed_tokens.weight": signs, "a_norm": signs[0] * gradient}
    least = {"matrix": 0.5, "model.embed_tokens.weight": 0.5}
    return update(config, start(config, weights), found, 1, 1.0, least, torch.tensor([True, False]))[0]


TIGER = {"learning_rate": 0.01, "beta": 0.75, "weight_decay": 0.1}
ADAMW = {"embedding": {"rule": "adamw", "learning_rate": 0.2, "weight_decay": 0.5}}
BY_MATRIX = [[3 - 0.025 * 1.3, 4 + 0.025 * 0.6], [-0.025, -0.025]]
"""The root mean square of 3, 4, 0, 0 is 2.5."""
BY_ROW = [[3 - 0.01 * 12.5**0.5 * 1.3, 4 + 0.01 * 12.5**0.5 * 0.6], [-0.005, -0.005]]
"""The row of zeros has the least root mean square, 0.5."""


@pytest.mark.parametrize(
    ("section", "rules", "embedding"),
    [
        ({}, {}, BY_MATRIX),
        ({}, {"embedding": {"rows": "seen"}}, [BY_MATRIX[0], [0.0, 0.0]]),
        ({"embedding_rms": "row"}, {}, BY_ROW),
        ({}, ADAMW, [[3 - 2.0 * 2.5 / 10, 4 + 0.2 * -1.0], [-0.2, -0.2]]),
    ],
)
def test_tiger_by_hand(section: dict[str, Any], rules: dict[str, Any], embedding: list[list[float]]):
    after = one_update({**TIGER, **section}, **rules)
    assert after.weights["matrix"].tolist() == [pytest.approx(row) for row in BY_MATRIX]
    assert after.weights["model.embed_tokens.weight"].tolist() == [pytest.approx(row) for row in embedding]
    assert after.weights["a_norm"].tolist() == pytest.approx([1.995, 1.005])
    assert after.momentum["matrix"].tolist() == [[0.25, -0.25], [0.25, 0.25]]
    assert set(after.second_moment) == ({"model.embed_tokens.weight"} if rules == ADAMW else set())


@pytest.mark.parametrize(("what", "matrix", "gain"), [("skip", 3.0, [2.0, 1.0]), ("shrink", 2.97, [1.99, 1.0])])
def test_an_update_with_a_gradient_that_is_not_finite(what: str, matrix: float, gain: list[float]):
    after = one_update({**TIGER, "non_finite": what}, gradient=math.inf)
    assert after.weights["matrix"][0, 0].item() == pytest.approx(matrix)
    assert after.weights["a_norm"].tolist() == pytest.approx(gain)
    assert not any(momentum.any() for momentum in after.momentum.values())


def test_a_bad_update_leaves_an_embedding_under_adamw_where_it_is_and_shrinks_the_rest():
    after = one_update({**TIGER, "non_finite": "shrink"}, gradient=math.nan, **ADAMW)
    assert after.weights["model.embed_tokens.weight"].tolist() == [[3, 4], [0, 0]]
    assert after.weights["matrix"].tolist() == [[pytest.approx(2.97), pytest.approx(3.96)], [0, 0]]


def test_fold_leaves_out_the_bad_part_of_a_tensor_and_moves_nothing():
    config = configured(optimizer={"tiger": TIGER}, parallel={"engine": "fold"})
    state = State({"a": torch.ones(1), "b": torch.ones(1)}, {"a": torch.ones(1), "b": torch.ones(1)})
    parts = [{"a": torch.tensor([math.nan]), "b": torch.tensor([4.0])}, {"a": torch.tensor([8.0]), "b": torch.tensor([4.0])}]
    store = Store(config, torch.float64, 0)
    after, size = fold(config, state, parts, 1.0, {"a": 0.1, "b": 0.1}, torch.ones(1), data_ranks=1, store=store)
    assert math.isnan(size) and after.weights == state.weights
    assert (after.momentum["a"].item(), after.momentum["b"].item()) == (0.75 + 0.25 * 8, 0.75 + 0.25 * 8)


def test_the_adamw_of_an_embedding_is_torchs_with_its_own_betas_and_decay():
    name, generator = "model.embed_tokens.weight", torch.Generator().manual_seed(0)
    rules = {"embedding": {**ADAMW["embedding"], "eps": 0.1}}
    config = configured(optimizer={"rules": rules, "max_grad_norm": 0})
    state = start(config, {name: torch.randn(4, 3, generator=generator, dtype=torch.float64)})
    theirs = nn.Parameter(state.weights[name].clone())
    package = torch.optim.AdamW([theirs], lr=0.1, betas=(0.9, 0.95), eps=0.1, weight_decay=0.5)
    for number in (1, 2, 3):
        theirs.grad = torch.randn(4, 3, generator=generator, dtype=torch.float64)
        package.step()
        state, _ = update(config, state, {name: theirs.grad}, number, 0.5, {}, torch.zeros(4))
    assert far(state.weights[name], theirs.detach()) < 1e-14


def test_the_least_rms_is_a_tenth_of_the_initial_deviation():
    config = configured(model={**SIZES, "residual_init": "zero", "tied_head": "projection"})
    found = floors(config)
    assert found["model.layers.0.mlp.up_proj.weight"] == pytest.approx(0.01)
    assert found["model.layers.1.mlp.down_proj.weight"] == pytest.approx(0.01 / 2)
    assert found["lm_head.projection.weight"] == pytest.approx(0.1 / math.sqrt(32))
    assert set(found) == {name for name in shapes(config) if "norm" not in name}
    small = floors(configured(model={**SIZES, "tied_head": "small-init"}))
    assert small["model.embed_tokens.weight"] == pytest.approx(0.1 * math.log(VOCABULARY) / 32)
    assert set(floors(configured(optimizer={"tiger": {"rms_floor": 0.3}})).values()) == {0.3}


def trained(engine: str, parts: int, steps: int = 3, **keywords: Any) -> Result:
    """Tiger for some steps on four rows a step, in equal parts."""
    section = {"tiger": TIGER, "max_grad_norm": 0}
    config = configured(optimizer=section, parallel={"engine": engine}, schedule={"warmup_steps": 2}, train={"steps": 4})

    def batches(n: int) -> list[Batch]:
        return [(rows[:, :-1], rows[:, 1:], None) for rows in tokens(n, 4).chunk(parts)]

    return train(config, batches, steps, **keywords)


@pytest.mark.parametrize(("parts", "ranks"), [(1, 1), (4, 1), (4, 2)])
def test_fold_is_the_plain_update_and_reports_the_norms_of_its_parts(parts: int, ranks: int):
    plain, folded = trained("zero", 1), trained("fold", parts, data_ranks=ranks)
    assert max(far(folded.weights[name], weight) for name, weight in plain.weights.items()) < 1e-12
    assert max(far(folded.states[name], state) for name, state in plain.states.items() if state.any()) < 1e-9
    config = configured()
    rows = [(r[:, :-1], r[:, 1:], None) for r in tokens(0, 4).chunk(parts)]
    squares = [norm(gradients(config, initial_weights(config), [row])[1]) ** 2 for row in rows]
    assert folded.records[0].grad_norm == pytest.approx(math.sqrt(sum(squares) / parts), rel=1e-12)
    assert [record.loss for record in folded.records] == pytest.approx([record.loss for record in plain.records], rel=1e-12)


@pytest.mark.parametrize("engine", ["zero", "fold"])
def test_training_resumes_where_it_stopped(engine: str):
    whole, begun = trained(engine, 2, 4), trained(engine, 2, 2)
    rest = trained(engine, 2, 2, first=2, state=begun.state)
    assert begun.records + rest.records == whole.records
    assert all(torch.equal(rest.weights[name], weight) for name, weight in whole.weights.items())
    assert [record.learning_rate for record in whole.records] == pytest.approx([0.005, 0.01, 0.0055, 0.001])


@pytest.mark.parametrize("engine", ["zero", "fold"])
def test_bfloat16_is_near_the_truth_and_is_not_it(engine: str):
    truth, single, half = (trained(engine, 2, dtype=dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16))
    for record, close, rough in zip(truth.records, single.records, half.records, strict=True):
        assert abs(close.loss - record.loss) < 1e-6 < abs(rough.loss - record.loss) < 0.03
        assert abs(rough.grad_norm / record.grad_norm - 1) < 0.1
    kept = [weight.dtype for weight in half.weights.values()]
    assert set(kept) == {torch.float32}
    narrow = all(torch.equal(weight, weight.bfloat16().float()) for weight in half.weights.values())
    assert narrow == (engine == "fold")


@pytest.mark.parametrize(("rounding", "mean"), [("stochastic", 0.25), ("nearest", 0.0)])
def test_stochastic_rounding_keeps_the_mean(rounding: str, mean: float):
    store = Store(SimpleNamespace(optimizer=SimpleNamespace(rounding=rounding)), torch.bfloat16, 0)
    drawn = (store(torch.full((10000,), 1 + 2.0**-9)) - 1) * 2**7
    assert set(drawn.tolist()) <= {0.0, 1.0}
    assert drawn.mean().item() == pytest.approx(mean, abs=0.02)


def test_drawn_errors_are_as_small_as_those_of_float32_and_leave_zeros():
    gradients = {"a": torch.randn(100, 50, dtype=torch.float64) * 3, "b": torch.zeros(4, dtype=torch.float64)}
    gradients["a"][7] = 0
    found = rounded(gradients, torch.Generator().manual_seed(0))
    error = (found["a"] - gradients["a"])[gradients["a"] != 0]
    assert error.square().mean().sqrt().item() == pytest.approx(ERROR * 3, rel=0.1)
    assert not found["a"][7].any() and not found["b"].any()
    assert rounded(gradients, None) is gradients


def test_drawn_weights_lie_as_near_as_bfloat16_rounds():
    weights = {"a": torch.randn(100, 50, dtype=torch.float64), "a.mlp.gate.e_score_correction_bias": torch.ones(6)}
    found = beside(weights, torch.Generator().manual_seed(0))
    share = (found["a"] / weights["a"] - 1).abs()
    assert 0.9 * 2**-8 < share.max().item() <= 2**-8 and share.mean().item() == pytest.approx(2**-9, rel=0.1)
    assert torch.equal(found["a.mlp.gate.e_score_correction_bias"], torch.ones(6))
    assert beside(weights, None) is weights


@pytest.mark.parametrize(("near", "least", "most"), [(0.0, 1e-3, math.inf), (1.0, 0.0, 1e-6)])
def test_errors_move_the_norm_only_where_a_sign_hangs_on_them(near: float, least: float, most: float):
    """What Lion takes the sign of is zero but for rounding, or it is not: in the first case the next norm is in doubt."""
    config = configured(model=SIZES, optimizer={"name": "lion", "lion": {"learning_rate": 0.05, "weight_decay": 0.0}})
    batches = [[batch(2 * n), batch(2 * n + 1)] for n in range(2)]
    state = start(config, initial_weights(config))
    _, gradient = gradients(config, state.weights, batches[0], torch.float64)
    beta = config.optimizer.lion.betas[0]
    for name, found in gradient.items():  # Lion steps by the sign of beta momentum + (1 - beta) clipped gradient
        state.momentum[name] = found * (near - 1) * (1 - beta) / beta * clipping(config, norm(gradient))
    drawn = [
        train(config, batches.__getitem__, 2, state=copy.deepcopy(state), rounding=torch.Generator().manual_seed(seed))
        for seed in range(3)
    ]
    sizes = [result.records[1].grad_norm for result in drawn]
    assert least <= max(sizes) / min(sizes) - 1 <= most
