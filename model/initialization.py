"""Initial weights: drawn for the full tensor from a generator seeded by its name, then sliced."""

import math
import zlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.decoder import Decoder
from model.parameters import ParameterSpec, local_slice


def initial_std(config: ModelConfig, name: str) -> float:
    """Standard deviation a matrix starts with; NaN for one that starts orthogonal."""
    sigma = config.initializer_range
    if name.endswith("projection.weight"):
        return math.nan
    if name == "model.embed_tokens.weight" and config.tie_word_embeddings and config.tied_head == "small-init":
        return math.log(config.vocab_size) / config.hidden_size
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        match config.residual_init:
            case "scaled":
                return _scaled_std(config)
            case "plain":
                return sigma
            case "zero":
                return 0.0
    return sigma


def _scaled_std(config: ModelConfig) -> float:
    """Of a residual branch's last matrix: the variance of the sum of all branches does not grow with depth (GPT-2)."""
    return config.initializer_range / math.sqrt(2 * config.num_hidden_layers)


RMS_FLOOR_RATIO = 0.1
"""Tiger's smallest RMS of a tensor over its initial standard deviation: it lets zeros move, and acts on nothing drawn."""


def rms_floors(model: Decoder) -> dict[str, float]:
    """Smallest RMS by which Tiger scales the learning rate of each parameter, by name.

    A tenth of each initial standard deviation. A tensor of zeros counts as drawn with `residual_init = "scaled"`; an orthogonal
    projection has RMS 1 / sqrt(hidden_size).
    """
    config = model.config

    def initial_rms(name: str) -> float:
        std = initial_std(config, name)
        return 1.0 / math.sqrt(config.hidden_size) if math.isnan(std) else std or _scaled_std(config)

    return {name: RMS_FLOOR_RATIO * initial_rms(name) for name, _ in model.named_parameters()}


@torch.no_grad()
def initialise(model: Decoder, seed: int, parameters: Iterator[tuple[str, nn.Parameter]] | None = None) -> None:
    """Draw every weight: the full tensor from a generator seeded by its name, then this rank's slice of it.

    So the weights depend on the seed and the kind of device, not on the tensor-parallel size or the order of drawing.

    Args:
        parameters: names and parameters to draw; default all of the model.
    """
    for name, parameter in parameters or model.named_parameters():
        spec: ParameterSpec = parameter.spec  # type: ignore[attr-defined]
        if spec.kind in ("gain", "bias"):
            parameter.fill_(1.0 if spec.kind == "gain" else 0.0)
            continue
        full = draw_full_tensor(spec.shape, initial_std(model.config, name), seed, name, parameter.device)
        shape, start = local_slice(spec, model.kit.size, model.kit.rank)
        for dimension, (length, offset) in enumerate(zip(shape, start, strict=True)):
            full = full.narrow(dimension, offset, length)
        parameter.copy_(full)


def draw_full_tensor(shape: tuple[int, ...], std: float, seed: int, name: str, device: torch.device) -> Tensor:
    """One full float32 tensor: normal with deviation `std`, or orthogonal for NaN."""
    # 32 bits: the CPU's Mersenne twister ignores the rest of a seed
    generator = torch.Generator(device).manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    normal = torch.randn(shape, generator=generator, device=device)
    return torch.linalg.qr(normal)[0] if math.isnan(std) else normal.mul_(std)
