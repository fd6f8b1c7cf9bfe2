"""Two regions, packed documents and a kv head that ranks share give the same on two tensor-parallel ranks as on one."""

import torch

from model.config import ModelConfig
from model.decoder import Decoder
from model.initialization import initialise
from model.parallel.layers import serial_kit
from model.parallel.mesh import make_kit, make_mesh
from model.parameters import local_slice
from model.positions.config import PositionConfig
from tests.ranks import run_ranks

SIZES = {"vocab_size": 64, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "initializer_range": 0.3}
MLA = {"attention": "mla", "kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
CASES = [
    ({"num_attention_heads": 6, "num_key_value_heads": 1, "head_dim": 8}, {"kind": "rerope", "window": 5, "log_n": "trained"}),
    ({"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}, {"kind": "leaky-rerope", "window": 4, "leak": 0.1}),
    ({"num_attention_heads": 4, "sliding_window": 4, "full_attention_layers": [-1]}, {"kind": "rerope", "window": 5}),
    (
        {"num_attention_heads": 4, "sliding_window": 4, "full_attention_layers": [-1], "layers_without_positions": [-1]},
        {"kind": "yarn", "factor": 4.0, "attention_factor": 1.4, "windowed_rope_theta": 20.0, "log_n": "trained"},
    ),
    (
        {"num_attention_heads": 4, **MLA, "layers_without_positions": [0]},
        {"kind": "yarn", "factor": 4.0, "rotated_factor": 0.7},
    ),
    ({"num_attention_heads": 4, **MLA}, {"kind": "leaky-rerope", "window": 4, "leak": 16}),
]


def compare_split_with_whole(rank: int, world_size: int, sequence_parallel: bool) -> None:
    mesh = make_mesh(world_size, torch.device("cpu"))
    tokens = torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(1))
    bounds = torch.tensor([0, 11, 16, 32], dtype=torch.int32)
    for model, position in CASES:
        config, position_map = ModelConfig(**SIZES, **model), PositionConfig(**position)
        results = []
        for kit in (serial_kit(torch.float64), make_kit(mesh, sequence_parallel, torch.float64)):
            decoder = Decoder(config, position_map, 8, kit)
            initialise(decoder, 0)
            loss, _ = decoder(tokens[:, :-1], tokens[:, 1:], cu_seqlens=bounds)
            loss.backward()
            results.append((decoder, loss.detach()))
        (whole, want), (split, got) = results
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
        full = dict(whole.named_parameters())
        for name, parameter in split.named_parameters():
            wanted = full[name].grad
            shape, start = local_slice(parameter.spec, split.kit.size, split.kit.rank)
            for dimension, (length, offset) in enumerate(zip(shape, start, strict=True)):
                wanted = wanted.narrow(dimension, offset, length)
            torch.testing.assert_close(parameter.grad, wanted, rtol=1e-9, atol=1e-11)


def test_tokens_whole_on_every_rank():
    run_ranks(compare_split_with_whole, 2, False)


def test_tokens_split_over_ranks():
    run_ranks(compare_split_with_whole, 2, True)
