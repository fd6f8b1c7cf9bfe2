"""The layers of one device against torch's own, and the description of every parameter."""

import pytest
import torch

from model.config import ModelConfig
from model.decoder import Decoder
from model.parallel.layers import Norm, serial_kit
from model.parameters import Normal
from model.positions.config import PositionConfig


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.bfloat16, 8e-3)])
def test_norm_is_rms_norm(dtype: torch.dtype, tolerance: float):
    """bf16 is rounded twice (2^-8 each): of the normed values and of their product with the gain."""
    norm, x = Norm(16, 1e-3, dtype), torch.randn(5, 16, dtype=dtype)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        want = torch.nn.functional.rms_norm(x.double(), (16,), norm.weight.double(), 1e-3)
        got = norm(x)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=0)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.bfloat16, 4e-3)])
def test_a_zero_centred_gain_is_added_to_1_before_anything_is_rounded(dtype: torch.dtype, tolerance: float):
    """bf16 is rounded once, 2^-8; 1 + w rounded by itself would be off by as much again."""
    norm, x = Norm(16, 1e-3, dtype, zero_centered=True), torch.randn(500, 16, dtype=dtype)
    assert not norm.weight.any() and norm.weight.spec.centre == 0.0  # type: ignore[attr-defined]
    with torch.no_grad():
        norm.weight.uniform_(-0.5, 0.5)
        want = torch.nn.functional.rms_norm(x.double(), (16,), 1 + norm.weight.double(), 1e-3)
        got = norm(x)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=0)


def test_a_bias_is_added():
    kit, x = serial_kit(torch.float64), torch.randn(3, 6, dtype=torch.float64)
    for make in (kit.column, kit.row, kit.replicated):
        layer = make(6, 4, Normal(1.0), "mlp", True)
        assert (layer.bias.spec.kind, layer.bias.spec.shape, layer.bias.spec.initial.value) == ("bias", (4,), 0.0)
        torch.nn.init.normal_(layer.weight), torch.nn.init.normal_(layer.bias)
        torch.testing.assert_close(layer(x), x @ layer.weight.T + layer.bias)


def test_linears_have_no_bias_unless_asked_and_an_embedding_looks_up():
    kit, x = serial_kit(torch.float64), torch.randn(3, 6, dtype=torch.float64)
    for make in (kit.column, kit.row, kit.replicated):
        layer = make(6, 4, Normal(1.0), "mlp")
        assert [*dict(layer.named_parameters())] == ["weight"] and layer.weight.shape == (4, 6)
        torch.nn.init.normal_(layer.weight)
        torch.testing.assert_close(layer(x), x @ layer.weight.T)
    embedding = kit.embedding(7, 2, Normal(1.0))
    torch.nn.init.normal_(embedding.weight)
    assert torch.equal(embedding(torch.tensor([5, 0])), embedding.weight[[5, 0]])


def test_one_device_communicates_nothing():
    kit, x = serial_kit(), torch.randn(2, 3)
    assert kit.column_input(x) is x and kit.gather_last(x) is x
    with kit.tokens_whole():
        assert (kit.size, kit.rank) == (1, 0)


def test_every_parameter_says_what_it_is():
    model = Decoder(ModelConfig(tie_word_embeddings=False), PositionConfig(), 32, serial_kit())
    kinds = {name: parameter.spec.kind for name, parameter in model.named_parameters()}
    assert kinds["model.embed_tokens.weight"] == "embedding"
    assert kinds["lm_head.weight"] == "head"
    assert all((kind == "gain") == ("norm" in name) for name, kind in kinds.items())
    assert all(parameter.spec.shape == tuple(parameter.shape) for parameter in model.parameters())
