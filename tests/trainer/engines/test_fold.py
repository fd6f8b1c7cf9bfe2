"""The fold engine: gradients go into the momentum and nowhere else (Su 2021, kexue.fm/archives/8634)."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend
from torch.utils._python_dispatch import TorchDispatchMode

from model.config import ModelConfig
from model.decoder import Decoder
from model.initialization import initialise, rms_floors
from model.parallel.layers import serial_kit
from model.parallel.mesh import Mesh, make_kit, make_mesh
from model.positions.config import PositionConfig
from tests.ranks import run_ranks
from tests.trainer.rules import SEEN, optimizer
from tests.trainer.tiny import VOCABULARY, Batch, Tiny, sequences, split
from trainer.engines.base import StepHooks, TrainingState
from trainer.engines.fold import Fold
from trainer.optimizers import fused, rounding

CPU, BETA = torch.device("cpu"), 0.965


@pytest.fixture
def plainly_compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Traced as torch.compile traces, without a C++ compiler; the graphs made of each function."""
    graphs, compile = Counter[str](), torch.compile

    def compile_plainly(function: Any, options: Any = None, **how: Any) -> Any:
        def counted(graph: Any, inputs: Any) -> Any:
            graphs[function.__name__] += 1
            return lookup_backend("aot_eager")(graph, inputs)

        return compile(function, backend=counted, **how)

    monkeypatch.setattr(torch, "compile", compile_plainly)
    caches = (fused.compiled, fused.compiled_for, rounding._compiled_hash)
    for made in caches:
        made.cache_clear()
    torch._dynamo.reset()
    yield graphs
    for made in caches:
        made.cache_clear()


def fold(model: Tiny, mesh: Mesh | None = None, bucket_numbers: int = 100, **settings: Any) -> Fold:
    floors = {name: 0.02 for name, _ in model.named_parameters()}
    return Fold(
        model, optimizer(**settings), mesh or Mesh(), seed=0, rms_floor=floors, bucket_numbers=bucket_numbers
    )  # fmt: skip


def momenta(engine: Fold) -> dict[str, Tensor]:
    return {fragment.name: fragment.state["momentum"] for fragment in engine.fragments()}


def mean_gradient(model: Tiny, batch: Batch) -> dict[str, Tensor]:
    loss, count = model(batch.inputs_BS, batch.targets_BS)
    names, weights = zip(*model.named_parameters(), strict=True)
    return {name: g.view(-1) for name, g in zip(names, torch.autograd.grad(loss / count, weights), strict=True)}


def test_the_momentum_is_as_it_was_when_its_change_is_announced() -> None:
    """Once per step, after the first forward; whether to leave is not asked, for the momentum has part of the step by then."""
    model, said = Tiny(True, torch.float64), list[str]()

    def announced() -> None:
        same = all(torch.equal(momentum, before[name]) for name, momentum in momenta(engine).items())
        said.append("state changes" if same else "too late")

    hooks = StepHooks(said.append, lambda: pytest.fail("asked"), announced)
    engine = Fold(model, optimizer(), Mesh(), seed=0, rms_floor={}, bucket_numbers=100, hooks=hooks)
    for step in range(2):
        before = {name: momentum.clone() for name, momentum in momenta(engine).items()}
        engine.accumulate(split(sequences(step), 2))
    assert said == 2 * ["forward", "state changes", "backward", "forward", "backward"]


def test_it_holds_four_bytes_per_parameter_in_bfloat16() -> None:
    model = Tiny(False, torch.bfloat16)
    two_bytes = 2 * sum(weight.numel() for weight in model.parameters())
    engine = fold(model)
    assert engine.training_state() == TrainingState(two_bytes, two_bytes, "optimizer state") and engine.description == "fold"
    muon = optimizer("muon", nesterov=False, others="tiger")
    engine = Fold(Tiny(False, torch.bfloat16), muon, Mesh(), seed=0, rms_floor={}, bucket_numbers=100)
    assert engine.training_state() == TrainingState(two_bytes, two_bytes, "optimizer state")


@pytest.mark.parametrize("tied", [True, False])
def test_the_hook_takes_every_gradient_once_and_frees_it(tied: bool) -> None:
    model = Tiny(tied, torch.float64)
    wanted = mean_gradient(model, sequences(0))
    engine, calls = fold(model), []
    inner = engine._fold
    engine._fold = lambda fragment, gradient: (calls.append(fragment.name), inner(fragment, gradient))[1]  # type: ignore[method-assign]
    before = [weight.clone() for weight in model.parameters()]
    loss = engine.accumulate(split(sequences(0), 4))
    assert sorted(calls) == sorted(name for name, _ in model.named_parameters() for _ in range(4))
    assert all(weight.grad is None for weight in model.parameters())
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    for name, momentum in momenta(engine).items():
        torch.testing.assert_close(momentum, (1 - BETA) * wanted[name], rtol=1e-6, atol=1e-8)
    with torch.no_grad():
        total, count = model(sequences(0).inputs_BS, sequences(0).targets_BS)
    torch.testing.assert_close(loss.double(), total / count, rtol=1e-6, atol=0)
    assert engine.update(1e-3).skipped.item() is False
    assert not any(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def two_ranks(rank: int, world_size: int, dtype: torch.dtype, bucket_numbers: int) -> Any:
    mesh = make_mesh(1, CPU)
    engine = fold(Tiny(True, dtype), mesh, bucket_numbers)
    for step in range(3):
        engine.accumulate(split(split(sequences(step), 2)[rank], 2))
        engine.update(1e-3)
    return [(f.values.double().numpy(), f.state["momentum"].double().numpy()) for f in engine.fragments()]


@pytest.mark.parametrize("bucket_numbers", [1, 100, 10_000])
def test_two_ranks_give_the_momentum_of_one(bucket_numbers: int) -> None:
    alone = fold(Tiny(True, torch.float64))
    for step in range(3):
        alone.accumulate(split(sequences(step), 4))
        alone.update(1e-3)
    for rank in run_ranks(two_ranks, 2, torch.float64, bucket_numbers):
        for (values, momentum), fragment in zip(rank, alone.fragments(), strict=True):
            torch.testing.assert_close(torch.from_numpy(momentum), fragment.state["momentum"], rtol=1e-12, atol=1e-15)
            torch.testing.assert_close(torch.from_numpy(values), fragment.values, rtol=1e-12, atol=1e-15)


def test_bfloat16_ranks_hold_the_same_bits() -> None:
    first, second = run_ranks(two_ranks, 2, torch.bfloat16, 100)
    again = run_ranks(two_ranks, 2, torch.bfloat16, 1)[0]
    for one, other, repeated in zip(first, second, again, strict=True):
        for index in range(2):
            assert (one[index] == other[index]).all()
            assert (one[index] == repeated[index]).all()


@pytest.mark.parametrize("factor", [torch.nan, torch.inf])
@pytest.mark.parametrize("bad", [0, 1, 2, 3])
def test_a_bad_micro_batch_adds_nothing_and_stops_the_step(bad: int, factor: float) -> None:
    good = [1.0] * 4
    poisoned = good[:bad] + [0.0] + good[bad + 1 :]
    model = Tiny(False, torch.float64)
    engine, reference = fold(model), fold(Tiny(False, torch.float64))
    for some in (engine, reference):
        some.accumulate(split(sequences(0), 4))
        some.update(1e-3)
    model.poison, reference.model.poison = good[:bad] + [factor] + good[bad + 1 :], poisoned
    before = [weight.clone() for weight in model.parameters()]
    for some in (engine, reference):
        some.accumulate(split(sequences(1), 4))
    what = engine.update(1e-3)
    assert what.skipped.item() and not what.grad_norm.isfinite()
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    for name, momentum in momenta(engine).items():
        torch.testing.assert_close(momentum, momenta(reference)[name], rtol=1e-12, atol=1e-15)
    engine.accumulate(split(sequences(2), 4))
    assert not engine.update(1e-3).skipped.item()


@pytest.mark.parametrize("compile", [False, True])
def test_an_element_that_is_not_finite_adds_nothing_and_the_others_do(plainly_compiled: Counter[str], compile: bool) -> None:
    engine, clean = (fold(Tiny(False, torch.bfloat16), compile=compile) for _ in range(2))
    for poison in (torch.nan, -torch.inf, 2.0**64, -1e38):
        before = [weight.clone() for weight in engine.model.parameters()]
        for some, value in ((engine, poison), (clean, 0.0)):
            some._begin_step(1)
            some._begin_backward(0)
            for fragment in some.fragments():
                gradient = torch.linspace(-1, 1, fragment.values.numel()).bfloat16()
                gradient[5] = value
                some._fold(fragment, gradient)
            some._gradient_square = some._gradient_square if some._row_buffers is None else some._row_buffers.total()
        for one, other in zip(engine.fragments(), clean.fragments(), strict=True):
            assert torch.equal(one.state["momentum"], other.state["momentum"]) and one.state["momentum"].isfinite().all()
        what = engine.update(1e-3)
        assert what.skipped.item() and not what.grad_norm.isfinite()
        assert all(torch.equal(old, new) for old, new in zip(before, engine.model.parameters(), strict=True))
        assert not clean.update(1e-3).skipped.item()


def decoder(layers: int, device: str = "cpu") -> Decoder:
    """Matrices that are square, wide and high, vectors, an embedding and a head."""
    sizes = {"vocab_size": 40, "hidden_size": 24, "intermediate_size": 36, "num_attention_heads": 3, "num_key_value_heads": 1}
    config = ModelConfig(**sizes, num_hidden_layers=layers, qk_norm="rms", tie_word_embeddings=False)
    with torch.device(device):
        return Decoder(config, PositionConfig(), 8, serial_kit(torch.bfloat16))


def test_few_graphs_serve_tensors_of_every_shape(plainly_compiled: Counter[str]) -> None:
    """Torch compiles a function at most eight times, and from then on would refuse."""
    settings: dict[str, Any] = {"rules": SEEN, "embedding_rms": "row"}
    model = decoder(2)
    initialise(model, 0)
    engine = Fold(model, optimizer(compile=True, **settings), Mesh(), seed=0, rms_floor=rms_floors(model), bucket_numbers=100)
    drawn = torch.randint(0, 40, (4, 9), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        engine.accumulate([Batch(drawn[:, :-1], drawn[:, 1:])] * 2)
        engine.update(1e-3)
    assert plainly_compiled.keys() == {"_hash_words", "fold", "move"}
    assert max(plainly_compiled.values()) <= 6, plainly_compiled


class Launches(TorchDispatchMode):
    """Counts what a GPU would be asked for: every operation that is no view."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view and "empty" not in str(func)
        return func(*args, **(kwargs or {}))


def test_what_an_update_asks_for_beside_one_kernel_a_tensor_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors take a GPU less time than the host needs to ask for a handful of operations."""
    monkeypatch.setattr(
        "trainer.optimizers.rounding._compiled_hash", lambda: lambda columns, _, rows, *__: (columns, rows, rows)
    )
    monkeypatch.setattr("trainer.optimizers.fused.compiled_for", lambda make, rule: lambda *arguments: None)
    found = []
    for layers in (2, 6):
        model = decoder(layers, "meta")
        engine = Fold(
            model, optimizer(compile=True), Mesh(device=torch.device("meta")), seed=0,
            rms_floor=dict.fromkeys((name for name, _ in model.named_parameters()), 0.1), bucket_numbers=100,
        )  # fmt: skip
        gradients = {fragment.name: torch.empty_like(fragment.values) for fragment in engine.fragments()}
        for _ in range(2):  # the first update makes what is kept
            with Launches() as asked, torch.no_grad():
                engine._begin_step(1)
                engine._begin_backward(0)
                for fragment in engine.fragments():
                    engine._fold(fragment, gradients[fragment.name])
                engine._gradient_square = engine._row_buffers.total()  # type: ignore[union-attr]
                engine.update(1e-3)
        found.append(asked.count)
    assert found[0] == found[1] < 60, found


def test_shrink_is_a_choice() -> None:
    model = Tiny(False, torch.float64)
    engine = fold(model, non_finite="shrink")
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    model.poison = [1.0, torch.nan]
    engine.accumulate(split(sequences(0), 4))
    assert engine.update(1e-3).skipped.item()
    for name, weight in model.named_parameters():
        wanted = torch.ones(8, dtype=torch.float64) if name == "gain" else 0.99 * before[name]
        torch.testing.assert_close(weight.detach(), wanted, rtol=1e-14, atol=0)


def test_a_step_left_out_keeps_the_weights() -> None:
    model = Tiny(True, torch.bfloat16)
    engine = fold(model)
    before = [weight.clone() for weight in model.parameters()]
    engine.accumulate([sequences(0)])
    assert engine.update(1e-3, skip=True).skipped.item()
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert engine.steps_done == 1


def test_a_weight_without_a_gradient_only_decays() -> None:
    model = Tiny(False, torch.float64)
    engine = fold(model)
    engine.accumulate([sequences(0)])
    before = momenta(engine)["gain"].clone()
    model.gain.requires_grad_(False)
    engine.accumulate(split(sequences(1), 2))
    torch.testing.assert_close(momenta(engine)["gain"], BETA * before, rtol=1e-14, atol=0)


def test_rounding_moves_what_nearest_leaves() -> None:
    """A gain of 1 and a rate of 0.5e-3: half the spacing of bfloat16 is four times that (T7)."""
    moved = {}
    for how in ("stochastic", "nearest"):
        model = Tiny(False, torch.bfloat16)
        engine = fold(model, rounding=how)
        for step in range(30):
            engine.accumulate([sequences(step)])
            engine.update(1e-3)
        moved[how] = (model.gain != 1).any().item()
    assert moved == {"stochastic": True, "nearest": False}


def trained(rank: int, world_size: int, compile: bool, embedding_rms: str) -> Any:
    """Weights and momenta of a few updates, all in one."""
    mesh = make_mesh(1, CPU)
    engine = fold(Tiny(False, torch.bfloat16), mesh, compile=compile, embedding_rms=embedding_rms)
    for step in range(5):
        engine.accumulate(split(sequences(step), 2 * world_size)[rank::world_size])
        engine.update(1e-2)
    return torch.cat([torch.cat((f.values, f.state["momentum"])) for f in engine.fragments()]).float().numpy()


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "embedding_rms"), [(1, "matrix"), (1, "row"), (2, "matrix")])
def test_compiled_passes_round_as_the_plain_ones(ranks: int, embedding_rms: str) -> None:
    """The same noise on the same numbers; a last bit of float32 may tip a rare one to the neighbour."""
    plain, compiled = (torch.from_numpy(run_ranks(trained, ranks, how, embedding_rms)[0]) for how in (False, True))
    differ = plain != compiled
    assert differ.float().mean() < 1e-3
    torch.testing.assert_close(compiled, plain, rtol=2**-7, atol=1e-4)


def test_the_gradient_norm_of_one_micro_batch_is_exact_and_of_more_a_bound() -> None:
    model = Tiny(False, torch.float64)
    exact = torch.cat(list(mean_gradient(model, sequences(0)).values())).norm().float()
    norms = {}
    for parts in (1, 4):
        engine = fold(Tiny(False, torch.float64))
        engine.accumulate(split(sequences(0), parts))
        norms[parts] = engine.update(1e-3).grad_norm
    torch.testing.assert_close(norms[1], exact, rtol=1e-6, atol=0)
    assert norms[4] > exact


def norm_where_sequences_are_shared(rank: int, world_size: int) -> tuple[float, float, float]:
    """What the engine reports; from the gradients that ranks have, the same; and the norm of their sum."""
    mesh = make_mesh(1, CPU, context_parallel_size=world_size)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 36, "num_attention_heads": 3}
    config = ModelConfig(**sizes, num_hidden_layers=2, initializer_range=0.2)
    one, other = (Decoder(config, PositionConfig(), 8, make_kit(mesh, dtype=torch.float64)) for _ in range(2))
    initialise(one, 0)
    initialise(other, 0)
    batches = split(sequences(0, rows=4, length=8), 2)
    engine = Fold(one, optimizer("tiger"), mesh, seed=0, rms_floor=rms_floors(one), bucket_numbers=100)
    engine.accumulate(batches)
    reported = engine.update(1e-3).grad_norm.item()
    count, parts = sum(int((batch.targets_BS >= 0).sum()) for batch in batches), []
    for batch in batches:
        loss, _ = other(batch.inputs_BS, batch.targets_BS)
        (loss / count).backward()
        parts.append(torch.cat([p.grad.flatten() for p in other.parameters()]))  # type: ignore[union-attr]
        other.zero_grad()
    square = mesh.context.sum(sum(part.square().sum() for part in parts))  # type: ignore[arg-type]
    number = len(batches) * world_size
    return reported, (number * square).sqrt().item(), mesh.context.sum(sum(parts)).norm().item()  # type: ignore[arg-type]


def test_the_gradient_norm_is_of_what_ranks_have_of_a_shared_sequence() -> None:
    for reported, of_parts, exact in run_ranks(norm_where_sequences_are_shared, 2):
        assert reported == pytest.approx(of_parts, rel=1e-6) and of_parts > 1.01 * exact


def test_closing_takes_the_hooks_off() -> None:
    model = Tiny(False, torch.float32)
    engine = fold(model)
    engine.close()
    loss, _ = model(sequences(0).inputs_BS, sequences(0).targets_BS)
    loss.backward()
    assert model.matrix.grad is not None and not momenta(engine)["matrix"].any()


@pytest.mark.parametrize("residual_init", ["scaled", "zero"])
def test_a_fresh_network_moves_by_rate_times_rms_as_published(residual_init: Any) -> None:
    """Deep networks start their output projections far below sigma; only what starts at zero needs the floor."""
    config = ModelConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=8, residual_init=residual_init)
    model = Decoder(config, PositionConfig(), 8, serial_kit(torch.float64))
    initialise(model, 0)
    settings = optimizer(weight_decay=0.0)
    engine = Fold(model, settings, Mesh(), seed=0, rms_floor=rms_floors(model), bucket_numbers=100)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    drawn = torch.randint(0, 32, (4, 9), generator=torch.Generator().manual_seed(0))
    engine.accumulate([Batch(drawn[:, :-1], drawn[:, 1:])])
    engine.update(1e-3)
    for name, weight in model.named_parameters():
        size = before[name].square().mean().sqrt().item()
        wanted = 0.5 if weight.ndim == 1 else size or 0.1 * 0.02 / 4  # 4 = sqrt(2 x 8 layers)
        moved = (weight.detach() - before[name]).abs().max().item()
        if residual_init == "zero" and "layers" in name and not name.endswith(("o_proj.weight", "down_proj.weight")):
            wanted = 0.0  # no gradient comes through a branch that ends in zeros
        assert moved == pytest.approx(1e-3 * wanted, rel=1e-9), name
