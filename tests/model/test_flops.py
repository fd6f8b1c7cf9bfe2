"""Operations against hand counts, published numbers and torch's own counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.config import ModelConfig
from model.decoder import Decoder
from model.flops import attention_flops_per_token, flops_per_token, matrix_flops_per_token, stage_bounds
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


def test_stages_weigh_blocks_by_their_flops_and_the_last_one_the_head_too():
    """Of each block 4 * 64 * 64 + 3 * 64 * 128 elements and, at 16 tokens, 64 * (16 + 1) products of scores; of the head 64 per
    row. A head as costly as two blocks moves the middle of ten by one."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 10, "num_attention_heads": 4}
    block = 4 * 64 * 64 + 3 * 64 * 128 + 64 * (16 + 1)
    for blocks, bounds in ((0, (0, 5, 10)), (2, (0, 6, 10)), (4, (0, 7, 10)), (6, (0, 8, 10)), (40, (0, 9, 10))):
        config = ModelConfig(vocab_size=max(8, block * blocks // 64), **sizes)
        assert stage_bounds(config, 16, 2) == bounds, blocks
    untied = ModelConfig(vocab_size=block * 4 // 64, tie_word_embeddings=False, **sizes)
    assert stage_bounds(untied, 16, 2) == (0, 7, 10)
    assert stage_bounds(ModelConfig(vocab_size=8, **sizes), 16, 1) == (0, 10)


def test_stages_weigh_the_scores_of_layers_without_a_window():
    """The first two of six layers see all of 40,000 tokens, the others eight: by blocks the cut would be in the middle."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 8}
    config = ModelConfig(num_hidden_layers=6, sliding_window=8, full_attention_layers=[0, 1], **sizes)
    assert stage_bounds(config, 40_000, 2) == (0, 1, 6) and stage_bounds(config, 8, 2) == (0, 3, 6)


def test_more_stages_than_layers_are_refused_in_one_sentence():
    with pytest.raises(ValueError) as caught:
        stage_bounds(ModelConfig(num_hidden_layers=3), 16, 4)
    assert str(caught.value) == "model.num_hidden_layers = 3 cannot be cut into 4 pipeline stages; use at most 3"
