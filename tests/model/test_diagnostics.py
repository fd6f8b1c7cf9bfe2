"""Diagnostics of attention whose statistics are known."""

import math

import pytest
import torch

from model.attention.base import AttentionPart
from model.attention.kernels.inputs import AttentionInputs
from model.config import ModelConfig
from model.decoder import Decoder
from model.diagnostics import attention_statistics, part_statistics
from model.initialization import initialise
from model.parallel.layers import serial_kit
from model.parallel.mesh import Mesh
from model.positions.config import PositionConfig


def means(q, k, sampled):
    """Mean entropy and concentration, and the largest logit, of one head with queries and keys [S, H]."""
    part = AttentionPart(AttentionInputs(*(x[None, :, None] for x in (q, k, k))), None, None)
    entropy, concentration, count, largest = part_statistics(part, 1.0, sampled).tolist()
    assert count == len(sampled)
    return entropy / count, concentration / count, largest


def test_equal_scores_are_uniform():
    entropy, concentration, largest = means(torch.zeros(32, 8), torch.randn(32, 8), torch.arange(32))
    assert entropy == pytest.approx(sum(math.log(n) for n in range(1, 33)) / 32, rel=1e-5)
    assert concentration == pytest.approx(1.0, rel=1e-5)
    assert largest == 0.0


def test_one_key_has_all_probability():
    k = torch.zeros(32, 8)
    k[0, 0] = 1.0
    entropy, concentration, largest = means(torch.full((32, 8), 100.0), k, torch.arange(32))
    assert entropy == pytest.approx(0.0, abs=1e-6)
    assert concentration == pytest.approx(sum(n**-0.5 for n in range(1, 33)) / 32, rel=1e-5)
    assert largest == 100.0


def test_concentration_of_exponential_scores():
    """e^(-sigma^2 |q|^2 / 2) = 0.8825 for deviation 0.5 (Su 2023, kexue.fm/archives/9889)."""
    torch.manual_seed(0)
    k = torch.randn(200_000, 4)
    q = torch.zeros(200_000, 4)
    q[-1, 0] = 0.5
    assert means(q, k, torch.tensor([len(q) - 1]))[1] == pytest.approx(0.8825, abs=3e-3)


@pytest.mark.parametrize(
    "kind",
    [
        {"num_key_value_heads": 2}, {"sliding_window": 6, "full_attention_layers": [-1]},
        {"norm_placement": "post", "qk_norm": "rms-all-heads"},
    ],
)  # fmt: skip
def test_every_layer_has_its_statistics(kind):
    config = ModelConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
        initializer_range=0.3, **kind,
    )  # fmt: skip
    decoder = Decoder(config, PositionConfig(kind="rerope", window=5), 16, serial_kit())
    initialise(decoder, 0)
    statistics = attention_statistics(decoder, torch.randint(0, 40, (2, 30)), Mesh())
    assert len(statistics) == 3
    for layer, of_layer in enumerate(statistics):
        visible = 6 if not config.full_layer(layer) else 30
        assert 0 < of_layer.entropy < math.log(visible)
        assert 0 < of_layer.concentration <= 1
        assert of_layer.largest_logit > 0
