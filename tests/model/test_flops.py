"""Operations against hand counts, published numbers and torch's own counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.config import ModelConfig
from model.decoder import Decoder
from model.flops import attention_flops_per_token, flops_per_token, matrix_flops_per_token
from model.parallel.layers import serial_kit
from model.positions.config import PositionConfig
from tests.model.networks import LLAMA_8B, NETWORKS


def test_flops_of_llama_8b_by_hand():
    multiplied = 8_030_261_248 - 525_336_576 - 65 * 4096
    assert flops_per_token(LLAMA_8B, 4096, causal=False) == 6 * multiplied + 12 * 32 * 4096 * 4096
    assert flops_per_token(LLAMA_8B, 4096, causal=True) == 6 * multiplied + 6 * 32 * 4096 * 4097


def test_published_mfu_of_an_8b_model():
    """10,471 tokens per second on a peak of 989 TFLOP/s, without the input embedding: 54.5 % full, 51.1 % causal."""
    full, causal = (10_471 * flops_per_token(LLAMA_8B, 4096, causal=causal) / 989e12 for causal in (False, True))
    assert full == pytest.approx(0.545, abs=5e-4)
    assert causal == pytest.approx(0.511, abs=5e-4)


def test_a_tied_head_multiplies():
    tied = ModelConfig(tie_word_embeddings=True, tied_head="half-swap")
    untied = ModelConfig(tie_word_embeddings=False)
    assert flops_per_token(tied, 64, causal=True) == flops_per_token(untied, 64, causal=True)


def test_windowed_scores_are_counted_one_by_one():
    config = ModelConfig(num_hidden_layers=3, sliding_window=5, full_attention_layers=[-1])
    length = 16
    windowed = sum(1 for i in range(length) for j in range(i + 1) if i - j < 5)
    full = length * (length + 1) / 2
    per_score = 2 * config.num_attention_heads * 2 * config.head_size
    assert attention_flops_per_token(config, length, causal=True) == pytest.approx(per_score * (2 * windowed + full) / length)


@pytest.mark.parametrize("name", NETWORKS)
def test_matrix_products_as_torch_counts_them(name):
    """Forward and backward; torch's counter does not see inside our attention, so attention has a test of its own."""
    config = NETWORKS[name]
    decoder = Decoder(config, PositionConfig(), 16, serial_kit())
    tokens = torch.randint(96, (2, 16))
    with FlopCounterMode(display=False) as counter:
        loss, _ = decoder(tokens, tokens)
        loss.backward()
    counted = sum(
        count for module, ops in counter.get_flop_counts().items() if module == "Global"
        for op, count in ops.items() if str(op) in ("aten.mm", "aten.addmm")
    )  # fmt: skip
    assert counted == 3 * matrix_flops_per_token(config) * 32


@pytest.mark.parametrize("name", ["gqa", "mla"])
def test_attention_products_as_torch_counts_them(name):
    """The products of every score, as a kernel without a mask computes them: torch's count for dense attention."""
    config = NETWORKS[name]
    heads, length = config.num_attention_heads, 16
    q, k = (torch.randn(heads, length, config.head_size, requires_grad=True) for _ in range(2))
    v = torch.randn(heads, length, config.value_size, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        torch.bmm(torch.softmax(torch.bmm(q, k.mT), -1), v).sum().backward()
    counted = counter.get_total_flops() * config.num_hidden_layers / length
    assert counted == 3 * attention_flops_per_token(config, length, causal=False)
