"""The attention module by its name, and tensor-parallel sizes that no attention can have."""

import pytest

from model.attention.gqa import GroupedQueryAttention
from model.attention.kinds import make_attention
from model.attention.mla import LatentAttention
from model.config import ModelConfig
from model.parallel.layers import serial_kit


def test_the_name_chooses_the_module():
    latent = ModelConfig(attention="mla", kv_lora_rank=12, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5)
    assert isinstance(make_attention(ModelConfig(), 0, serial_kit()), GroupedQueryAttention)
    assert isinstance(make_attention(latent, 0, serial_kit()), LatentAttention)
    with pytest.raises(ValueError, match=r"model\.attention = 'linear' is unknown; legal: gqa, mla"):
        make_attention(ModelConfig().model_copy(update={"attention": "linear"}), 0, serial_kit())


def test_heads_that_do_not_divide_over_ranks_are_refused():
    kit = serial_kit()
    kit.size = 3
    with pytest.raises(ValueError, match="num_attention_heads = 4 cannot be split over tensor_parallel_size = 3"):
        make_attention(ModelConfig(), 0, kit)
