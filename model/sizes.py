"""Sizes of a network that need not exist, asked of the network itself, on torch's meta device, which holds no values."""

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import get_args

import torch

from model.block import TransformerBlock
from model.config import ModelConfig
from model.decoder import Decoder
from model.feed_forward.router import router_bias_name
from model.parallel.layers import Kit
from model.parameters import ParameterPart, ParameterSpec, local_slice, tensors_of
from model.positions.config import PositionConfig


@lru_cache(maxsize=32)
def planned_network(config: ModelConfig, tensor_parallel_size: int = 1) -> Decoder:
    """The network as one tensor-parallel rank has it, on the meta device and without process groups. Do not change it.

    Raises:
        ValueError: the ranks do not divide what they would share, in one sentence.
    """
    with torch.device("meta"):
        return Decoder(config, PositionConfig(), 1, Kit(size=tensor_parallel_size))


def planned_blocks(
    config: ModelConfig, layers: tuple[int, ...] | None, tensor_parallel_size: int = 1
) -> list[TransformerBlock]:  # fmt: skip
    """The blocks of `planned_network` with these numbers; None: all."""
    blocks = _all_blocks(config, tensor_parallel_size)
    return [*blocks] if layers is None else [blocks[layer] for layer in layers]


@lru_cache(maxsize=32)
def _all_blocks(config: ModelConfig, tensor_parallel_size: int) -> tuple[TransformerBlock, ...]:
    """Kept, since a module goes through its names whenever it is asked for its children."""
    return tuple(planned_network(config, tensor_parallel_size).blocks)


def has_last(config: ModelConfig, layers: tuple[int, ...] | None) -> bool:
    """Whether the last layer is among these, with which the final norm and the head go; None: all."""
    return layers is None or config.num_hidden_layers - 1 in layers


def check_split(config: ModelConfig, tensor_parallel_size: int) -> None:
    """Refuse a group of ranks that the network cannot be split over.

    Raises:
        ValueError: one sentence.
    """
    if tensor_parallel_size > 1:  # all blocks after the first with experts are split as it is
        layers = config.layers_with_experts[0] + 1 if config.layers_with_experts else 1
        planned_network(config.model_copy(update={"num_hidden_layers": layers}), tensor_parallel_size)


@lru_cache(maxsize=32)
def parameter_specs(config: ModelConfig, tensor_parallel_size: int = 1) -> dict[str, ParameterSpec]:
    """Every parameter by name, in the order of the network, and how it is split over so many tensor-parallel ranks."""
    network = planned_network(config, tensor_parallel_size)
    tensors = [tensor for name, parameter in network.named_parameters() for tensor in tensors_of(name, parameter)]
    return {tensor.name: tensor.spec for tensor in tensors}


@lru_cache(maxsize=32)
def elements_per_rank(config: ModelConfig, tensor_parallel_size: int) -> dict[str, int]:
    """Elements of every parameter on a tensor-parallel rank by name, in the order of the network."""
    specs = parameter_specs(config, tensor_parallel_size)
    return {name: math.prod(local_slice(spec, tensor_parallel_size, 0)[0]) for name, spec in specs.items()}


@lru_cache(maxsize=32)
def parameters_per_rank(config: ModelConfig, tensor_parallel_size: int) -> dict[str, int]:
    """The same of every parameter as the network holds it: the matrices of a layer's experts lie in stacks."""
    return {name: parameter.numel() for name, parameter in planned_network(config, tensor_parallel_size).named_parameters()}


def full_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Full shape of all that a checkpoint holds of the network by name: parameters, and biases of routers."""
    shapes = {name: spec.shape for name, spec in parameter_specs(config).items()}
    biased = config.layers_with_experts if config.router_bias else ()
    return shapes | {router_bias_name(layer): (config.n_routed_experts,) for layer in biased}


def check_held(config: ModelConfig, held: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Refuse a network larger than the tensors that are to fill it, before any of it is built: a stranger's configuration may
    name any size.

    Args:
        held: shapes of the tensors by name.
        where: whose they are, for the sentence.

    Raises:
        ValueError: one sentence.
    """
    elements = sum(map(math.prod, held.values()))
    least = max(config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.vocab_size)
    if config.layers_with_experts:
        least = max(least, config.n_routed_experts, config.moe_intermediate_size)
    if config.num_hidden_layers > len(held) or least > elements:
        described = f"num_hidden_layers = {config.num_hidden_layers} and hidden_size = {config.hidden_size}"
    else:
        try:
            wanted = sum(map(math.prod, full_shapes(config).values()))
        except (RuntimeError, OverflowError):  # torch cannot express the size
            described = "tensors beyond any memory"
        else:
            if wanted <= elements:
                return
            described = f"{wanted} elements"
    raise ValueError(
        f"the configuration of {where} describes {described}, its files hold {len(held)} tensors with {elements} elements; "
        "they do not belong together"
    )


def parameter_counts(config: ModelConfig) -> dict[str, int]:
    """Number of parameters by part: embedding, attention, mlp (with routers and shared experts), routed experts, norms, head (0
    when tied to the embedding); total; and active, those that a token passes: all but the experts that it does not go to.

    The embedding counts whole in both, as for Mixtral, Qwen 3 and OLMoE; what DeepSeek publishes as activated is without it.
    """
    counts = dict.fromkeys(get_args(ParameterPart), 0)
    for spec in parameter_specs(config).values():
        counts[spec.part] += spec.elements
    total = sum(counts.values())
    passed = counts["experts"] * config.num_experts_per_tok // config.n_routed_experts
    return counts | {"total": total, "active": total - counts["experts"] + passed}
