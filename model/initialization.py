"""Initial weights: drawn for the full tensor from a generator seeded by its name, then sliced."""

import math
import zlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from model.decoder import Decoder
from model.parameters import ParameterSpec, local_slice, tensors_of

RMS_FLOOR_RATIO = 0.1
"""Tiger's smallest RMS of a tensor over that of its initial values: it lets zeros move, and acts on nothing drawn."""


def rms_floors(model: nn.Module) -> dict[str, float]:
    """Smallest RMS by which Tiger scales the learning rate of each parameter, by name: a tenth of that which its initial
    distribution says."""
    tensors = [tensor for name, parameter in model.named_parameters() for tensor in tensors_of(name, parameter)]
    return {tensor.name: RMS_FLOOR_RATIO * tensor.spec.initial.reference_rms for tensor in tensors}


@torch.no_grad()
def initialise(model: Decoder, seed: int, parameters: Iterable[tuple[str, nn.Parameter]] | None = None) -> None:
    """Draw every weight: the full tensor from a generator seeded by its name, then this rank's slice of it.

    So the weights depend on the seed and the kind of device, not on the tensor-parallel size or the order of drawing.

    Args:
        parameters: names and parameters to draw; default all of the model.
    """
    for name, parameter in parameters or model.named_parameters():
        for tensor in tensors_of(name, parameter):
            spec = tensor.spec
            full = draw_full_tensor(spec, seed, tensor.name, parameter.device)
            shape, start = local_slice(spec, model.kit.size, model.kit.rank)
            own = full[tuple(slice(offset, offset + length) for length, offset in zip(shape, start, strict=True))]
            values = parameter.view(-1)[tensor.start : tensor.start + math.prod(shape)].view(shape)
            if spec.padding:
                values.zero_()
            values[: len(own)].copy_(own)


def draw_full_tensor(spec: ParameterSpec, seed: int, name: str, device: torch.device) -> Tensor:
    """The initial values of a parameter over all tensor-parallel ranks, without padding, from a generator of its own."""
    # 32 bits: the CPU's Mersenne twister ignores the rest of a seed
    generator = torch.Generator(device).manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    return spec.initial.draw(spec.shape, generator)
