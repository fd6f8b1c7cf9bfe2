"""Small mixtures of experts for the tests, and passes through them."""

from typing import Any

import torch
from torch import Tensor

from model.config import ModelConfig
from model.feed_forward.moe import MixtureOfExperts
from model.parallel.layers import serial_kit

SIZES = {"hidden_size": 16, "intermediate_size": 40, "num_attention_heads": 2, "moe_intermediate_size": 12}
T = 24
"""Tokens, of two rows."""


def layer(dtype: torch.dtype = torch.float32, **keys: Any) -> MixtureOfExperts:
    """A layer with drawn weights and biases, its kit without other ranks."""
    torch.manual_seed(0)
    made = MixtureOfExperts(ModelConfig(feed_forward="moe", **{**SIZES, **keys}), serial_kit(dtype))
    for parameter in made.parameters():
        parameter.data.normal_(std=0.4)
    if made.gate.config.router_bias:
        made.gate.bias_E.data.normal_(std=0.1)
    return made


def stream(dtype: torch.dtype = torch.float32, tokens: int = T) -> Tensor:
    """Tokens that enter a layer."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(tokens, SIZES["hidden_size"], generator=generator).to(dtype).requires_grad_()


def passed(made: MixtureOfExperts, h_TD: Tensor, rows: int = 2) -> dict[str, Tensor]:
    """Output, loads, and gradients of the input and of every parameter, where the output's gradient is drawn."""
    for leaf in (h_TD, made.gate.bias_E, *made.parameters()):
        leaf.grad = None
    y_TD = made(h_TD, rows)
    generator = torch.Generator().manual_seed(2)
    y_TD.backward(torch.randn(y_TD.shape, generator=generator).to(y_TD.dtype))
    return {
        "y": y_TD.detach(), "load": _gradient(made.gate.bias_E), "h": _gradient(h_TD),
        **{name: _gradient(parameter) for name, parameter in made.named_parameters()},
    }  # fmt: skip


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad.clone()
