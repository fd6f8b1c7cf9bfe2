"""A network whose layers lie on several ranks, against plain formulas in float64 and the whole network in one process."""

import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from launch.config import RunConfig
from model.attention.kv_cache import KVCache
from model.decoder import Decoder
from model.diagnostics import attention_statistics
from model.generate import generate
from model.initialization import initialise
from model.parallel.layers import serial_kit
from model.parallel.mesh import Mesh, make_kit, make_mesh
from model.parallel.pipeline import cut_evenly
from tests.combinations.cases import LATENT, POSITIONS, SIZES, S, batch, configured, shaken, tokens
from tests.combinations.network import logits
from tests.ranks import run_ranks
from trainer.evaluate import evaluate

CPU, EXACT, LAYERS = torch.device("cpu"), 1e-11, 5
WINDOWED = {"sliding_window": 11, "full_attention_layers": [1, -1]}
NETWORKS: dict[str, tuple[dict[str, Any], str]] = {
    "half-swap": ({"scale_embedding": True}, "rope"),
    "plain": ({"tied_head": "plain", "num_key_value_heads": 2}, "leaky"),
    "projection": ({"tied_head": "projection", **LATENT}, "yarn log n"),
    "small-init": ({"tied_head": "small-init", **WINDOWED}, "rope"),
    "untied": ({"tie_word_embeddings": False, "norm_placement": "sandwich", **WINDOWED}, "rerope"),
}
"""By its head: keys of the network, and the position map."""
PROMPTS, NEW = [[1, 2, 3], [4], [5, 6]], 6


def configuration(name: str) -> RunConfig:
    keys, position = NETWORKS[name]
    return configured(model={**SIZES, "num_hidden_layers": LAYERS, **keys}, position=POSITIONS[position])


def network(name: str, mesh: Mesh, stages: int) -> Decoder:
    """What a rank has of the network in float64, with its part of the weights of the reference."""
    config = configuration(name)
    bounds = cut_evenly([1.0] * LAYERS, stages) if mesh.pipeline.size > 1 else ()
    kit = make_kit(mesh, dtype=torch.float64, stage_bounds=bounds)
    model, weights = Decoder(config.model, config.position, S, kit), shaken(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(weights[key])
    return model


@functools.cache
def wanted(name: str, documents: bool, ids: tuple[int, ...] | None = None) -> Tensor:
    """Logits [B, S, V] by the formulas, of the batch or of one row of ids."""
    config, (inputs_BS, _, boundaries) = configuration(name), batch(documents=documents)
    weights = {key: weight.double() for key, weight in shaken(config).items()}
    return logits(config, weights, inputs_BS if ids is None else torch.tensor([ids]), boundaries)


def losses_by_row(name: str, documents: bool) -> Tensor:
    """Sums and numbers of scored targets, float64 [2, B]."""
    z, (_, targets_BS, _) = wanted(name, documents), batch()
    sums = torch.stack([cross_entropy(*row, reduction="sum") for row in zip(z, targets_BS, strict=True)])
    return torch.stack((sums, (targets_BS >= 0).sum(dim=1).double()))


def forwards(model: Decoder, name: str, mesh: Mesh, label: str) -> Iterator[str]:
    """Logits on all ranks, and losses on those of the last stage, where they are not those of the formulas."""
    for documents in (False, True):
        inputs_BS, targets_BS, boundaries = batch(documents=documents)
        got, want = model(inputs_BS, cu_seqlens=boundaries), wanted(name, documents)
        if not (got - want).abs().max() < EXACT * want.abs().max():
            yield f"{label}: logits with documents = {documents} are off by {(got - want).abs().max().item()}"
        by_row = losses_by_row(name, documents) * model.kit.pipeline.is_last
        for rows, expected in ((True, by_row), (False, by_row.sum(dim=1))):
            found = torch.stack([x.double() for x in model(inputs_BS, targets_BS, boundaries, by_row=rows)])
            found = mesh.context.sum(found)
            if found.shape != expected.shape or not torch.allclose(found, expected, rtol=EXACT, atol=0):
                yield f"{label}: losses by row = {rows} are {found.tolist()}, wanted {expected.tolist()}"


def evaluated(model: Decoder, name: str, mesh: Mesh, label: str) -> Iterator[str]:
    """Mean held-out losses over two batches, in one forward and in chunks, where they are not those of the formulas."""
    for documents, chunk in ((False, 0), (False, 7), (True, 5), (True, 16)):
        inputs_BS, targets_BS, boundaries = batch(documents=documents)
        rows = SimpleNamespace(inputs_BS=inputs_BS, targets_BS=targets_BS, cu_seqlens=boundaries)
        score, (sums, counts) = evaluate(model, [rows, rows], mesh, chunk_tokens=chunk), losses_by_row(name, documents)
        mean = (sums.sum() / counts.sum()).item()
        if score.tokens != 2 * int(counts.sum()) or not abs(score.loss - mean) < EXACT * mean:
            yield f"{label}: a mean loss in chunks of {chunk} of {score.loss}, wanted {mean}"


def continued(name: str) -> list[list[int]]:
    """The likeliest next token of every prompt, again and again, from whole rows."""
    rows = [list(prompt) for prompt in PROMPTS]
    for row in rows:
        for _ in range(NEW):
            row.append(int(wanted(name, False, tuple(row))[0, -1].argmax()))
    return [[row[len(prompt) + index] for row, prompt in zip(rows, PROMPTS, strict=True)] for index in range(NEW)]


def decoded(model: Decoder, name: str, label: str) -> Iterator[str]:
    """Logits of a batch that passes through a cache in pieces, and greedy samples of prompts of several lengths."""
    inputs_BS, want = batch()[0], wanted(name, False)
    cache = KVCache(model.config, model.position, model.trained_length, len(inputs_BS), S)
    with model.kit.sequences_whole():
        got = torch.cat([model(piece, cache=cache) for piece in inputs_BS.split([9, 1, 1, S - 11], dim=1)], dim=1)
    if not (got - want).abs().max() < EXACT * want.abs().max():
        yield f"{label}: logits by a cache are off by {(got - want).abs().max().item()}"
    chosen = list(generate(model, PROMPTS, NEW))
    if chosen != continued(name):
        yield f"{label}: generated {chosen}, wanted {continued(name)}"


@torch.no_grad()
def faults(rank: int, world_size: int, context: int, names: list[str], stage_counts: list[int]) -> list[str]:
    mesh, found = make_mesh(1, CPU, context_parallel_size=context, pipeline_parallel_size=world_size // context), list[str]()
    for name in names:
        for stages in stage_counts:
            model, label = network(name, mesh, stages), f"{name} in {stages} stages"
            found += forwards(model, name, mesh, label)
            found += evaluated(model, name, mesh, label)
            found += decoded(model, name, label)
    return found


@pytest.mark.parametrize(
    ("ranks", "context", "names", "stages"),
    [
        (2, 1, ["plain", "untied"], [4]),
        pytest.param(2, 1, [*NETWORKS], [2, 4], marks=pytest.mark.slow),
        pytest.param(3, 1, [*NETWORKS], [3], marks=pytest.mark.slow),
        pytest.param(4, 2, [*NETWORKS], [2, 4], marks=pytest.mark.slow),
    ],
)
def test_logits_losses_and_samples_of_stages_are_those_of_the_formulas(
    ranks: int, context: int, names: list[str], stages: list[int]
):
    for found in run_ranks(faults, ranks, context, names, stages, timeout_seconds=280):
        assert not found


def held(rank: int, world_size: int, stages: int) -> dict[str, tuple[dict[str, list[float]], list[str], list[int], bool]]:
    """By network: the initial weights of this rank in its order, the names that it owns, its layers, whether it has a copy."""
    mesh, found = make_mesh(1, CPU, pipeline_parallel_size=world_size), {}
    for name in NETWORKS:
        config, bounds = configuration(name), cut_evenly([1.0] * LAYERS, stages)
        model = Decoder(config.model, config.position, S, make_kit(mesh, stage_bounds=bounds))
        initialise(model, 3)
        weights = {key: parameter.detach().flatten().tolist() for key, parameter in model.named_parameters()}
        layers = [block.layer for block in model.blocks]
        found[name] = weights, [*model.owned_parameters()], layers, model.tied_copy is not None
    return found


@pytest.mark.parametrize("stages", [4, pytest.param(2, marks=pytest.mark.slow)])
def test_ranks_hold_their_own_blocks_and_own_every_parameter_once_with_its_initial_value(stages: int):
    ranks, bounds = run_ranks(held, 2, stages), cut_evenly([1.0] * LAYERS, stages)
    for name in NETWORKS:
        config = configuration(name)
        whole = Decoder(config.model, config.position, S, serial_kit())
        initialise(whole, 3)
        weights = {key: parameter.detach().flatten().tolist() for key, parameter in whole.named_parameters()}
        for rank, (own, _, layers, copied) in enumerate(found[name] for found in ranks):
            mine = [layer for stage in range(rank, stages, 2) for layer in range(bounds[stage], bounds[stage + 1])]
            ends = ("model.embed_tokens.",) if rank == 0 else ("model.norm.", "lm_head.")
            copy = ("model.embed_tokens.",) if copied else ()
            prefixes = (*ends, *copy, *(f"model.layers.{layer}." for layer in mine))
            assert layers == mine and copied == (rank == 1 and config.model.tie_word_embeddings)
            assert own == {key: weights[key] for key in own} and set(own) == {n for n in weights if n.startswith(prefixes)}
        owned = [key for found in ranks for key in found[name][1]]
        assert sorted(owned) == sorted(weights), name
        assert "model.embed_tokens.weight" in ranks[0][name][1]


def statistics(rank: int, world_size: int, stages: int) -> dict[str, list[list[float]]]:
    mesh = make_mesh(1, CPU, pipeline_parallel_size=world_size) if world_size > 1 else Mesh()
    found = {}
    for name in ("plain", "projection", "small-init"):
        layers = attention_statistics(network(name, mesh, stages), tokens()[:, :21], mesh, queries=9)
        found[name] = [[layer.entropy, layer.concentration, layer.largest_logit] for layer in layers]
    return found


@pytest.mark.parametrize("stages", [4, pytest.param(2, marks=pytest.mark.slow)])
def test_every_rank_has_the_attention_statistics_of_all_layers(stages: int):
    want = statistics(0, 1, 1)
    for found in run_ranks(statistics, 2, stages):
        for name, layers in found.items():
            assert len(layers) == LAYERS
            torch.testing.assert_close(torch.tensor(layers), torch.tensor(want[name]), rtol=1e-5, atol=1e-6)


def test_a_rank_without_a_head_says_so():
    model = network("untied", Mesh(), 1)
    assert model.head is model.lm_head and model.tied_copy is None
    model.lm_head = None
    with pytest.raises(AssertionError, match="the last stage has the head"):
        _ = model.head
