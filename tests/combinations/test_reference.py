"""tiglon's network on one process in float32 against the reference in float64."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from launch.config import RunConfig
from launch.network import build_network
from model.parallel.mesh import Mesh
from model.parameters import stacked_experts, tensors_of
from tests.combinations.cases import CASES, MODELS, ROWS, SIZES, S, batch, case, configured, far, shaken, tokens
from tests.combinations.network import evaluate, gradients, logits
from tests.combinations.weights import initial_weights, kind, shapes


def loaded(config: RunConfig, weights: dict[str, Tensor]) -> Any:
    """tiglon's network with these weights."""
    decoder = build_network(config, Mesh())
    for name, values in by_tensor({name: parameter.data for name, parameter in decoder.named_parameters()}, decoder).items():
        values.copy_(weights[name])
    return decoder


def by_tensor(of_parameters: Mapping[str, Tensor | None], decoder: Any) -> dict[str, Tensor]:
    """Weights or gradients by the names that checkpoints have: each expert's part of a stack is a tensor of its own."""
    found = {}
    for name, parameter in decoder.named_parameters():
        for tensor, values in zip(tensors_of(name, parameter), _parts(of_parameters[name], parameter), strict=True):
            found[tensor.name] = values
    return found


def _parts(values: Tensor | None, parameter: Any) -> Sequence[Tensor]:
    assert values is not None
    return values.unbind(0) if stacked_experts(parameter) is not None else [values]


@pytest.mark.parametrize(("model", "position", "documents"), CASES)
def test_tiglon_has_the_loss_and_the_gradients_of_the_reference(model: str, position: str, documents: bool):
    config = case(model, position)
    weights = shaken(config)
    decoder, (inputs, targets, boundaries) = loaded(config, weights), batch(documents=documents)
    loss_sum, count = decoder(inputs, targets, cu_seqlens=boundaries)
    (loss_sum / count).backward()
    loss, wanted = gradients(config, weights, [(inputs, targets, boundaries)])
    assert (loss_sum / count).item() == pytest.approx(loss, rel=1e-6)
    found = by_tensor({name: parameter.grad for name, parameter in decoder.named_parameters()}, decoder)
    errors = {name: far(gradient, wanted[name]) for name, gradient in found.items()}
    assert set(errors) == set(wanted) and max(errors.values()) < 1e-5, errors


def test_tiglon_reads_with_another_map_as_the_reference_does():
    config = case("hwfa2", "rope")
    weights, rows = shaken(config), tokens(5)
    read = case("hwfa2", "rerope log n").position
    with torch.no_grad():
        seen = loaded(config, weights)(rows[:, :-1], position=read)
    got = F.cross_entropy(seen.flatten(0, 1), rows[:, 1:].flatten(), reduction="none").view(ROWS, S)
    want = evaluate(config, weights, rows, read)
    assert far(got, want) < 1e-6
    assert far(want, evaluate(config, weights, rows)) > 1e-3, "the map makes no difference: the test cannot fail"


def test_tiglon_scales_the_logits_of_windowed_layers_under_yarn():
    config = case("hwfa2", "yarn turns")
    weights, rows = shaken(config), tokens()
    with torch.no_grad():
        got = loaded(config, weights)(rows[:, :-1])
    assert far(got, logits(config, weights, rows[:, :-1])) < 1e-5


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_names_order_shapes_and_initial_values_are_tiglons(model: str, precision: str):
    config = configured(model={**SIZES, **MODELS[model]}, train={"precision": precision}, run={"seed": 3})
    decoder, ours = build_network(config, Mesh()), initial_weights(config)
    theirs = by_tensor({name: parameter.data for name, parameter in decoder.named_parameters()}, decoder)
    kinds = {tensor.name: tensor.spec.kind for n, p in decoder.named_parameters() for tensor in tensors_of(n, p)}
    assert list(ours) == list(theirs) == list(shapes(config))
    assert all(torch.equal(ours[name], parameter.float()) for name, parameter in theirs.items())
    assert kinds == {name: kind(name) for name in ours}
