import itertools
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from model import collectives
from model.config import ModelConfig, PositionConfig
from model.decoder import Decoder, initialise
from model.layers import full_slice, serial
from model.parallel import make_topology, tensor_parallel
from tests.ranks import run_ranks

GQA = {"num_attention_heads": 4, "num_key_value_heads": 2}
CASES = {
    "mha": {"num_attention_heads": 4},
    "gqa": GQA,
    "mqa": {"num_attention_heads": 4, "num_key_value_heads": 1},
    "untied": {**GQA, "tie_word_embeddings": False},
    "projection": {**GQA, "tied_head": "projection"},
    "rms": {**GQA, "num_key_value_heads": 1, "qk_norm": "rms"},
    "mla": {
        "num_attention_heads": 4, "attention": "mla", "q_lora_rank": 12, "kv_lora_rank": 16,
        "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
    },
}  # fmt: skip


def config(case: str) -> ModelConfig:
    return ModelConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, initializer_range=0.2, **CASES[case]
    )


def loss_and_gradients(model: Decoder) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    tokens_BS = torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(1))
    loss, _ = model(tokens_BS[:, :-1], tokens_BS[:, 1:])
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def compare_split_with_whole(rank: int, world_size: int, sequence_parallel: bool) -> None:
    topology = make_topology(world_size, torch.device("cpu"))
    for case in CASES:
        whole = Decoder(config(case), PositionConfig(), 16, serial(torch.float64))
        kit = tensor_parallel(topology, sequence_parallel, torch.float64)
        split = Decoder(config(case), PositionConfig(), 16, kit)
        initialise(whole, 0)
        initialise(split, 0)
        (want_loss, want), (loss, got) = loss_and_gradients(whole), loss_and_gradients(split)
        torch.testing.assert_close(loss, want_loss, rtol=1e-12, atol=0)
        assert got.keys() == want.keys()
        for name, parameter in split.named_parameters():
            shape, start = full_slice(parameter.logical, kit.size, kit.rank)
            mine = want[name]
            for dimension, (length, offset) in enumerate(zip(shape, start, strict=True)):
                mine = mine.narrow(dimension, offset, length)
            torch.testing.assert_close(
                got[name], mine, rtol=1e-9, atol=1e-11, msg=lambda text, where=f"{case} {name}": f"{where}: {text}"
            )


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_loss_and_gradients_do_not_depend_on_the_tensor_parallel_size(sequence_parallel: bool):
    run_ranks(compare_split_with_whole, 2, sequence_parallel)


COLLECTIVES = ["share", "reduce", "gather_tokens", "reduce_scatter_tokens", "scatter_tokens", "gather_last"]


VIEWS: dict[str, Callable[[torch.Tensor], tuple[torch.Tensor, ...]]] = {
    "itself": lambda y: (y,),
    "reshaped": lambda y: (y.view(-1, 2),),
    "slices": lambda y: (y[..., :1], y[..., 1:]),
    "split": lambda y: y.split((1, y.shape[-1] - 1), dim=-1),
    "turned": lambda y: (y.t(),),
}
"""What becomes of the result in the same compiled graph, at its end."""


def differences_when_compiled(rank: int, world_size: int) -> dict[str, list[float]]:
    """Of the result and of the gradient, relative to the eager ones."""
    found = {}
    for name, view in itertools.product(COLLECTIVES, VIEWS):
        send, see = getattr(collectives, name), VIEWS[view]

        def block(x: torch.Tensor, send=send, see=see) -> tuple[torch.Tensor, ...]:
            return see(send(3 * x, dist.group.WORLD))

        torch._dynamo.reset()
        pairs = []
        for run in (block, torch.compile(block, backend="aot_eager", fullgraph=True)):
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(rank)).requires_grad_()
            y = torch.cat([part.sin().reshape(-1) for part in run(x)])
            (y**2).sum().backward()
            assert x.grad is not None
            pairs.append((y.detach(), x.grad))
        found[f"{name}, {view}"] = [float((got - want).norm() / want.norm()) for want, got in zip(*pairs)]
    return found


def test_compiled_collectives_have_the_gradients_of_eager_ones():
    """Where only views of a result leave the graph, torch took them of what the collective read or wrote, past it."""
    for found in run_ranks(differences_when_compiled, 2):
        wrong = {name: pair for name, pair in found.items() if not max(pair) < 1e-6}
        assert not wrong


def test_full_slice():
    weight = serial().embedding(8, 4).weight
    assert full_slice(weight.logical, 2, 1) == ((8, 4), (0, 0))


def wrong_world(rank: int, world_size: int) -> str:
    with pytest.raises(ValueError) as caught:
        make_topology(3, torch.device("cpu"))
    return str(caught.value)


def test_a_world_that_no_group_divides_is_refused():
    assert run_ranks(wrong_world, 2)[0].startswith("2 ranks cannot form groups of parallel.tensor_parallel_size = 3")
