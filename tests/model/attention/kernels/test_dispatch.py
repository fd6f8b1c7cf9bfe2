"""Which backend is chosen, and what a run says of it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.attention.kernels import dispatch
from model.attention.kernels.dispatch import AttentionProblem, choose_backend
from model.attention.sliding_window import LayerPositions
from model.config import ModelConfig
from model.positions.batch import TokenLayout, make_positions
from model.positions.config import PositionConfig
from tests.model.attention.kernels.cases import packed, random_inputs

ROW = AttentionProblem("cuda", torch.bfloat16, 128, 128, tokens=4096)
TWO_REGIONS = replace(ROW, window=1024, two_regions=True)
SLIDING = replace(ROW, window=1024)
PACKED = replace(ROW, packed=True)
LATENT = replace(TWO_REGIONS, head_dim=192)


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(dispatch, "cudnn_serves", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)


@pytest.mark.parametrize(
    ("problem", "backend"),
    [
        (ROW, "sdpa"),
        (replace(ROW, dtype=torch.float32), "sdpa"),
        (TWO_REGIONS, "flash"),
        (replace(TWO_REGIONS, dtype=torch.float16), "flash"),
        (replace(TWO_REGIONS, tokens=8192), "cudnn"),
        (replace(TWO_REGIONS, dtype=torch.float32), "flex"),
        (replace(TWO_REGIONS, head_dim=264), "flex"),
        (replace(TWO_REGIONS, head_dim=68), "flex"),
        (replace(SLIDING, window=2047), "flash"),
        (replace(SLIDING, window=2048), "cudnn"),
        (LATENT, "cudnn"),
        (replace(LATENT, window=2), "flash"),  # one of the three calls would be of a single token
        (replace(LATENT, packed=True), "flash"),
        (PACKED, "flash"),
        (replace(PACKED, dtype=torch.float32), "flex"),
    ],
)
def test_a_gpu(hopper, problem, backend):
    assert choose_backend(problem) == backend


@pytest.mark.parametrize("wants_lse", [False, True])
@pytest.mark.parametrize(
    ("problem", "backend"),
    [
        (ROW, "flash"),
        (replace(ROW, dtype=torch.float32), "flex"),
        (replace(ROW, head_dim=264), "flex"),
        (TWO_REGIONS, "flash"),
        (replace(TWO_REGIONS, tokens=8192), "flash"),  # cuDNN takes as many queries as keys
        (replace(TWO_REGIONS, tokens=8192, dtype=torch.float32), "flex"),
        (replace(SLIDING, window=2048), "flash"),
        (LATENT, "flash"),
        (replace(LATENT, head_dim=264), "flex"),
        (PACKED, "flash"),
        (replace(PACKED, dtype=torch.float32), "flex"),
    ],
)
def test_a_gpu_with_fewer_queries(hopper, problem, backend, wants_lse):
    assert choose_backend(replace(problem, fewer_queries=True, wants_lse=wants_lse)) == backend


@pytest.mark.parametrize("wants_lse", [False, True])
@pytest.mark.parametrize("problem", [ROW, replace(ROW, tokens=100), TWO_REGIONS, SLIDING, PACKED])
def test_a_cpu_with_fewer_queries(problem, wants_lse):
    problem = replace(problem, device="cpu", fewer_queries=True, wants_lse=wants_lse)
    assert choose_backend(problem) == "cpu_tiled" and choose_backend(replace(problem, compiled=True)) == "cpu_flash"
    for other in ({"dtype": torch.float32}, {"head_dim": 24}, {"value_head_dim": 24}):
        assert choose_backend(replace(problem, compiled=True, **other)) == "cpu_tiled"


@pytest.mark.parametrize(
    ("problem", "eager", "compiled"),
    [
        (replace(ROW, tokens=512), "cpu_dense", "cpu_flash"),
        (replace(ROW, tokens=513), "sdpa", "cpu_flash"),
        (replace(ROW, tokens=512, dtype=torch.float32), "cpu_dense", "cpu_dense"),
        (replace(ROW, tokens=512, head_dim=24), "cpu_dense", "cpu_dense"),
        (replace(ROW, tokens=512, value_head_dim=24), "cpu_dense", "cpu_dense"),
        (replace(TWO_REGIONS, tokens=512), "cpu_tiled", "cpu_flash"),
        (replace(TWO_REGIONS, tokens=513), "cpu_sdpa", "cpu_flash"),
        (replace(SLIDING, tokens=513, dtype=torch.float64), "cpu_sdpa", "cpu_sdpa"),
        (replace(PACKED, tokens=512), "cpu_tiled", "cpu_flash"),
    ],
)
def test_a_cpu(problem, eager, compiled):
    problem = replace(problem, device="cpu")
    assert choose_backend(problem) == eager and choose_backend(replace(problem, compiled=True)) == compiled


def test_what_serves_is_taken_by_the_measured_table(hopper, monkeypatch):
    monkeypatch.setitem(dispatch.FASTEST, ("two regions", False), {0: "flex", 1024: "flash", 4096: "cudnn"})
    backends = [choose_backend(replace(TWO_REGIONS, window=100, tokens=tokens)) for tokens in (1023, 1024, 4095, 4096)]
    assert backends == ["flex", "flash", "flash", "cudnn"]
    monkeypatch.setattr(dispatch, "deterministic", lambda: True)
    assert choose_backend(TWO_REGIONS) == "flash"
    monkeypatch.setattr(dispatch, "deterministic", lambda: False)
    monkeypatch.setattr(dispatch, "cudnn_serves", lambda: False)
    assert choose_backend(TWO_REGIONS) == choose_backend(LATENT) == "flash"


@pytest.mark.parametrize(
    ("problem", "backend"),
    [
        (replace(ROW, tokens=2047), "flash"),
        (ROW, "cudnn"),
        (replace(ROW, dtype=torch.float32), "flex"),
        (replace(ROW, head_dim=264, value_head_dim=264), "flex"),
        (TWO_REGIONS, "flash"),
        (PACKED, "flash"),
        (replace(ROW, device="cpu", tokens=512), "cpu_dense"),
        (replace(ROW, device="cpu"), "cpu_sdpa"),
        (replace(ROW, device="cpu", compiled=True), "cpu_flash"),
    ],
)
def test_where_the_log_sum_exp_is_wanted_a_backend_that_has_it(hopper, problem, backend):
    assert choose_backend(replace(problem, wants_lse=True)) == backend


def test_an_unknown_device_is_named():
    with pytest.raises(ValueError, match="no kernel for device 'mps'"):
        choose_backend(replace(TWO_REGIONS, device="mps"))


@pytest.mark.parametrize(
    ("window", "far", "documents", "mask", "visible"),
    [
        (None, False, None, "causal", 64),
        (16, True, None, "two regions", 64),
        (16, False, None, "sliding window", 16),
        (99, False, None, "sliding window", 64),
        (16, False, packed(0, 64, 128), "packed documents", 16),
        (16, True, packed(0, 64, 128), "packed documents", 64),
    ],
)
def test_the_problem_of_a_call(window, far, documents, mask, visible):
    problem = AttentionProblem.of(random_inputs(64, far), window, documents, True)
    assert (problem.mask, problem.visible_tokens) == (mask, visible)
    assert problem == AttentionProblem(
        "cpu", torch.float64, 8, 6, 64, window, far, packed=documents is not None, compiled=True
    )  # fmt: skip


def test_the_problem_of_fewer_queries():
    problem = AttentionProblem.of(random_inputs(64, queries=5), 16, None, False)
    assert problem == AttentionProblem("cpu", torch.float64, 8, 6, 64, 16, True, fewer_queries=True)
    assert (problem.mask, problem.visible_tokens) == ("two regions", 64)
    with pytest.raises(ValueError, match="5 keys"):
        AttentionProblem.of(random_inputs(64).part(slice(None), slice(None), slice(0, 5)), None, None, False)


def test_the_meta_device_is_served_as_a_cpu():
    inputs = random_inputs(64, far=False).map(lambda x: x.to("meta"))
    assert choose_backend(AttentionProblem.of(inputs, None, None, False)) == "cpu_dense"


@pytest.mark.parametrize(
    ("version", "capability", "serves"),
    [(91501, (9, 0), True), (91500, (9, 0), False), (91200, (9, 0), False), (None, (9, 0), False), (92000, (8, 0), False)],
)
def test_cudnn_is_asked_where_it_is_right(monkeypatch, version, capability, serves):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    assert dispatch.cudnn_serves.__wrapped__() == serves


REROPE = PositionConfig(kind="rerope", window=1024)
LEAKY = PositionConfig(kind="leaky-rerope", window=1024, leak=16)
PATTERN = {"num_hidden_layers": 4, "sliding_window": 256, "full_attention_layers": [-1]}


@pytest.mark.parametrize(
    ("model", "position", "problem", "lines"),
    [
        ({}, PositionConfig(), ROW, ["causal on cuda: sdpa"]),
        ({}, REROPE, ROW, ["two regions (ReRoPE) on cuda: flash"]),
        ({}, LEAKY, replace(ROW, tokens=8192), ["two regions (Leaky ReRoPE) on cuda: cudnn 91900"]),
        ({}, REROPE, replace(ROW, tokens=1024), ["causal on cuda: sdpa"]),
        ({}, REROPE, replace(ROW, dtype=torch.float32), ["two regions (ReRoPE) on cuda: flex"]),
        ({}, REROPE, replace(ROW, device="cpu"), ["two regions (ReRoPE) on cpu: cpu_sdpa"]),
        ({}, REROPE, replace(ROW, device="cpu", compiled=True), ["two regions (ReRoPE) on cpu: cpu_flash"]),
        (
            {}, PositionConfig(), replace(PACKED, device="cpu"),
            ["packed documents, causal on cpu: cpu_tiled, documents above 512 tokens cpu_sdpa"],
        ),
        (
            PATTERN, REROPE, ROW,
            ["sliding window of 256 in 3 of 4 layers on cuda: flash", "two regions (ReRoPE) in 1 of 4 layers on cuda: flash"],
        ),
        (
            {**PATTERN, "full_attention_position": "none"}, REROPE, ROW,
            ["sliding window of 256 in 3 of 4 layers on cuda: flash", "causal in 1 of 4 layers on cuda: sdpa"],
        ),
        (
            {"num_hidden_layers": 4, "layers_without_positions": [0, -1]}, REROPE, ROW,
            ["causal in 2 of 4 layers on cuda: sdpa", "two regions (ReRoPE) in 2 of 4 layers on cuda: flash"],
        ),
        (PATTERN, PositionConfig(), replace(ROW, tokens=256), ["causal on cuda: sdpa"]),
    ],
)  # fmt: skip
def test_a_configuration_is_described(hopper, model, position, problem, lines):
    assert dispatch.describe(ModelConfig(**model), position, problem) == lines


def test_what_is_described_is_what_a_network_asks_for():
    """Every layer of a network on a CPU, by the windows that its layers compute."""
    config, row = ModelConfig(**PATTERN), replace(ROW, device="cpu")
    for position in (PositionConfig(), REROPE, LEAKY):
        for tokens in (200, 256, 600, 1024, 2000):
            positions = make_positions(position, config, TokenLayout(1, tokens), 512, "cpu", torch.float32)
            for layer in range(4):
                layer_positions = LayerPositions(config, layer)
                window = layer_positions.kernel_window(positions)
                far = window is not None and layer_positions.two_regions(positions)
                _, problem = dispatch._layer_problem(config, position, replace(row, tokens=tokens), layer)
                assert (problem.window, problem.two_regions) == (window, far), (position.kind, tokens, layer)


def test_the_page_lists_every_backend_with_its_file():
    kernels = Path(dispatch.__file__).parent
    page = (kernels.parents[2] / "docs" / "attention.md").read_text()
    for name, coverage in dispatch.BACKENDS.items():
        assert (kernels / coverage.file).exists()
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
        assert f"`{coverage.file}`" in row
