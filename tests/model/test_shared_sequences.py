"""Networks whose ranks share sequences, against one process by plain formulas in float64; and what one token can reach."""

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from launch.config import RunConfig
from model.decoder import Decoder
from model.diagnostics import attention_statistics
from model.generate import generate
from model.parallel.layers import serial_kit
from model.parallel.mesh import Mesh, make_kit, make_mesh
from model.parameters import local_slice, tensors_of
from model.recompute import selective_contexts
from tests.combinations.cases import CASES, LATENT, MODELS, POSITIONS, SIZES, S, batch, configured, shaken
from tests.combinations.network import gradients
from tests.ranks import run_ranks

EXACT = 1e-11
SLOW = pytest.mark.slow
EXCHANGES = ("gather", "heads")
RECOMPUTED = (("mla", "inverse", True), ("gqa", "rerope log n", True), ("hwfa2", "leaky", True))


def configuration(model: str, position: str, **more: Any) -> RunConfig:
    return configured(model={**SIZES, "vocab_size": 56, **MODELS[model], **more}, position=POSITIONS[position])


def network(config: RunConfig, mesh: Mesh, exchange: Any) -> Decoder:
    """The decoder in float64 on a rank of the mesh, with the weights of the reference."""
    kit = make_kit(mesh, dtype=torch.float64, context_exchange=exchange)
    model, weights = Decoder(config.model, config.position, S, kit), shaken(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(own_part(weights, name, parameter, mesh))
    return model


def own_part(full: dict[str, Tensor], name: str, parameter: Any, mesh: Mesh) -> Tensor:
    shape, start = local_slice(parameter.spec, mesh.tensor.size, mesh.tensor.rank)
    place = tuple(slice(begin, begin + length) for begin, length in zip(start, shape, strict=True))
    return torch.stack([full[tensor.name][place] for tensor in tensors_of(name, parameter)]).view_as(parameter)


@functools.cache
def wanted(case: tuple[str, str, bool]) -> tuple[float, dict[str, Tensor]]:
    """Mean loss and its gradients."""
    config = configuration(*case[:2])
    weights = {name: weight.double() for name, weight in shaken(config).items()}
    return gradients(config, weights, [batch(documents=case[2])])


def compare(model: Decoder, case: tuple[str, str, bool], mesh: Mesh, label: str) -> Iterator[str]:
    inputs_BS, targets_BS, boundaries = batch(documents=case[2])
    loss, count = model(inputs_BS, targets_BS, cu_seqlens=boundaries)
    loss.backward()
    total, scored = mesh.context.sum(torch.stack((loss.detach(), count.double()))).tolist()
    mean, expected = wanted(case)
    if not (scored == int((targets_BS >= 0).sum()) and abs(total / scored - mean) < EXACT * mean):
        yield f"{label}: loss {total / scored}, wanted {mean}"
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for name, parameter in model.named_parameters():
        got, want = mesh.context.sum(parameter.grad / scored), own_part(expected, name, parameter, mesh)  # type: ignore[operator]
        if not (got - want).abs().max() < EXACT * largest:
            yield f"{label}: gradient of {name} is off by {(got - want).abs().max().item():.2g} of {largest:.2g}"


def faults(rank: int, world_size: int, tensor: int) -> list[str]:
    mesh, found = make_mesh(tensor, torch.device("cpu"), context_parallel_size=world_size // tensor), list[str]()
    for case in CASES:
        for exchange in EXCHANGES if world_size != 3 else EXCHANGES[:1]:  # no number of heads divides by 3
            for recomputed in (False, True) if case in RECOMPUTED else (False,):
                if tensor > 1 and case[0] not in ("gqa", "mqa", "mla with query latent", "hwfa2"):
                    continue
                model = network(configuration(*case[:2]), mesh, exchange)
                if recomputed:
                    model.run_block = functools.partial(checkpoint, use_reentrant=False, context_fn=selective_contexts)
                found += compare(model, case, mesh, f"{case} {exchange}{' recomputed' * recomputed}")
    return found


@pytest.mark.parametrize(("ranks", "tensor"), [(2, 1), *(pytest.param(*two, marks=SLOW) for two in ((3, 1), (4, 1), (4, 2)))])
def test_loss_and_gradients_are_those_of_one_process(ranks: int, tensor: int):
    for found in run_ranks(faults, ranks, tensor):
        assert not found


MASKS: dict[str, tuple[dict[str, Any], str, list[int] | None]] = {
    "causal": ({}, "rope", None),
    "window": ({"sliding_window": 7}, "rope", None),
    "two regions": ({}, "leaky", None),
    "documents": ({}, "rope", [0, 1, 9, 10, 24]),
    "documents and a window": ({"sliding_window": 5}, "rope", [0, 3, 22, 24]),
    "documents and two regions": ({}, "rerope", [0, 2, 17, 24]),
    "latents": (LATENT, "inverse", [0, 11, 24]),
}


def visible(mask: str) -> Tensor:
    """Which token (column) the output of each (row) may see, bool [S, S]."""
    sizes, _, boundaries = MASKS[mask]
    i = torch.arange(S)
    document = torch.bucketize(i, torch.tensor(boundaries or [0, S])[1:], right=True)
    distance = i[:, None] - i
    seen = (distance >= 0) & (document[:, None] == document)
    return seen & (distance < sizes.get("sliding_window", S))


def reach(rank: int, world_size: int) -> dict[str, tuple[list[list[bool]], list[list[bool]]]]:
    """By mask and exchange: which outputs change with a token, and which tokens' gradients an output has."""
    mesh, found = make_mesh(1, torch.device("cpu"), context_parallel_size=world_size), {}
    for mask, (sizes, position, boundaries) in MASKS.items():
        config = configuration("untied", position, num_hidden_layers=1, num_key_value_heads=2, **sizes)
        documents = None if boundaries is None else torch.tensor(boundaries, dtype=torch.int32)
        for exchange in EXCHANGES:
            model, tokens = network(config, mesh, exchange), torch.arange(S)[None]
            with torch.no_grad():
                before = model(tokens, cu_seqlens=documents)[0]
                changed = [model(tokens + (S * (tokens == j)), cu_seqlens=documents)[0] != before for j in range(S)]
            forward = torch.stack([outputs.any(dim=1) for outputs in changed], dim=1)
            backward = torch.zeros(S, S, dtype=torch.bool)
            for i in range(S):
                model.zero_grad()
                loss, _ = model(tokens, torch.where(tokens == i, 1, -100), cu_seqlens=documents)
                loss.backward()
                backward[i] = (mesh.context.sum(model.model.embed_tokens.weight.grad)[:S] != 0).any(dim=1)
            found[f"{mask}, {exchange}"] = forward.tolist(), backward.tolist()
    return found


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=SLOW)])
def test_a_token_reaches_what_may_see_it_and_nothing_else(ranks: int):
    for found in run_ranks(reach, ranks):
        for name, (forward, backward) in found.items():
            seen = visible(name.partition(", ")[0]).tolist()
            assert forward == seen, f"{name}: outputs that change"
            assert backward == seen, f"{name}: tokens with a gradient"


def beside_training(rank: int, world_size: int, exchange: str) -> tuple[list[Any], list[list[int | None]], list[int]]:
    """Statistics of attention, tokens that are generated, and the shape of logits of rows that ranks do not divide."""
    mesh = make_mesh(1, torch.device("cpu"), context_parallel_size=world_size) if world_size > 1 else Mesh()
    config = configuration("hwfa2", "leaky")
    model, (inputs_BS, _, _) = network(config, mesh, exchange), batch()
    statistics = attention_statistics(model, inputs_BS[:, :21], mesh, queries=9)
    chosen = list(generate(model, [[1, 2, 3], [4]], 8))
    with torch.no_grad():
        logits = model(inputs_BS[:, :13])
    with model.kit.sequences_whole():
        assert torch.allclose(model(inputs_BS[:, :13]), logits, rtol=1e-12, atol=1e-12)
    assert model.kit.context.size == world_size
    values = [[x for x in vars(layer).values()] for layer in statistics]
    return values, chosen, [*logits.shape]


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_diagnostics_samples_and_other_lengths_are_those_of_one_process(exchange: str):
    statistics, chosen, shape = beside_training(0, 1, exchange)
    for got, tokens, logits in run_ranks(beside_training, 2, exchange):
        assert tokens == chosen and logits == shape == [3, 13, 56]
        torch.testing.assert_close(torch.tensor(got), torch.tensor(statistics), rtol=1e-5, atol=1e-5)


def test_a_kit_of_one_rank_shares_nothing():
    model = network(configuration("gqa", "rope"), Mesh(), "heads")
    assert model.kit.context.size == 1 == serial_kit().context.size
    assert replace(model.kit.context, exchange="gather") == serial_kit().context
