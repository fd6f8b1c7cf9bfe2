"""GeGLU against Hugging Face's Gemma 3."""

import torch
from transformers import Gemma3TextConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3MLP

from model.config import ModelConfig
from model.feed_forward.geglu import GeGLU
from model.parallel.layers import serial_kit


def test_it_is_gemmas():
    """In float64 the tanh approximation and GELU itself differ by 1e-4."""
    sizes = {"hidden_size": 16, "intermediate_size": 40, "num_attention_heads": 2}
    ours, theirs = GeGLU(ModelConfig(**sizes), serial_kit(torch.float64)), Gemma3MLP(Gemma3TextConfig(**sizes)).double()
    ours.load_state_dict(theirs.state_dict())
    h_TD = torch.randn(7, 16, dtype=torch.float64)
    torch.testing.assert_close(ours(h_TD, 1), theirs(h_TD), rtol=1e-12, atol=1e-14)
