"""The attention module of a layer, by `model.attention`."""

from torch import nn

from model.attention.gqa import GroupedQueryAttention
from model.attention.mla import LatentAttention
from model.config import ModelConfig
from model.parallel.layers import Kit


def make_attention(config: ModelConfig, layer: int, kit: Kit) -> nn.Module:
    """The attention of one layer.

    Raises:
        ValueError: the tensor-parallel size does not divide the query heads.
    """
    if config.num_attention_heads % kit.size:
        raise ValueError(
            f"num_attention_heads = {config.num_attention_heads} cannot be split over tensor_parallel_size = {kit.size}; "
            "choose a divisor"
        )
    match config.attention:
        case "gqa":
            return GroupedQueryAttention(config, layer, kit)
        case "mla":
            return LatentAttention(config, layer, kit)
        case _:
            raise ValueError(f"model.attention = '{config.attention}' is unknown; legal: gqa, mla")
