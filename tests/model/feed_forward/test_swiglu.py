"""SwiGLU against Hugging Face's Llama."""

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from model.config import ModelConfig
from model.feed_forward.swiglu import SwiGLU
from model.parallel.layers import serial_kit


def test_it_is_llamas():
    sizes = {"hidden_size": 16, "intermediate_size": 40, "num_attention_heads": 2}
    ours, theirs = SwiGLU(ModelConfig(**sizes), serial_kit()), LlamaMLP(LlamaConfig(**sizes, mlp_bias=False))
    ours.load_state_dict(theirs.state_dict())
    h_TD = torch.randn(7, 16)
    torch.testing.assert_close(ours(h_TD, 1), theirs(h_TD), rtol=1e-5, atol=1e-6)
