"""The network is built where it will live."""

from dataclasses import replace

import pytest
import torch
import torch._inductor

from launch import network as launched
from launch.load_config import build_config
from model.decoder import Decoder
from model.parallel.mesh import Mesh, make_mesh
from tests.ranks import run_ranks

META = torch.device("meta")
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
HEADS = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
LATENT = {"attention": "mla", "kv_lora_rank": 16, "q_lora_rank": 12, **HEADS}
GROUPED = {"num_key_value_heads": 2, "qk_norm": "rms", "tied_head": "projection"}


def built(model: dict, mesh: Mesh) -> Decoder:
    """On the meta device, which has no random numbers, without initial weights; what is moved afterwards raises."""
    parallel = {"tensor_parallel_size": mesh.tensor.size}
    config = build_config({"model": SIZES | model, "parallel": parallel, "train": {"sequence_length": 16, "precision": "bf16"}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launched, "initialise", lambda *_: None)
        patch.delattr(torch.nn.Module, "to")
        return launched.build_network(config, replace(mesh, device=META))


def elsewhere(model: Decoder) -> list[str]:
    """Parameters and buffers that are not on the meta device."""
    return [name for name, x in [*model.named_parameters(), *model.named_buffers()] if x.device != META]


@pytest.mark.parametrize("model", [{}, LATENT, GROUPED, {"tie_word_embeddings": False}], ids=["mha", "mla", "gqa", "untied"])
def test_every_tensor_is_made_on_the_device(model: dict) -> None:
    made = built(model, Mesh())
    assert elsewhere(made) == [] and next(made.parameters()).dtype == torch.bfloat16


def split(rank: int, world_size: int) -> list[list[str]]:
    mesh = make_mesh(2, torch.device("cpu"))
    return [elsewhere(built(model, mesh)) for model in (LATENT, GROUPED)]


def test_so_are_those_of_tensor_parallel_ranks() -> None:
    """Though Megatron is told to initialise on the CPU, which means no more than that it names no device."""
    assert run_ranks(split, 2) == [[[], []]] * 2


def test_torch_still_has_the_option_that_cuda_graphs_are_asked_for_with() -> None:
    options = torch._inductor.list_options()
    assert "triton.cudagraphs" in options, "torch.compile has no option triton.cudagraphs; launch/network.py must ask otherwise"


def test_each_length_of_rows_is_compiled_for_itself() -> None:
    """Torch would else compile the second one for any length, in a run that has seen the first and not in one that resumes."""
    dynamo = torch._dynamo.config
    for ramp, sizes, limit in (([[2, 8], [4, 4], [6, 8]], [4, 8, 16], 24), ([], [4, 16], 8)):
        train = {"sequence_length": 16, "precision": "fp32", "compile": True, "length_ramp": ramp}
        config = build_config({"model": SIZES, "train": train})
        torch._dynamo.reset()
        launched.build_network(config, Mesh())
        compiled: list[bool] = []

        def backend(graph: torch.fx.GraphModule, inputs: list, compiled: list = compiled) -> torch.fx.GraphModule:
            compiled.append(any(isinstance(size, torch.SymInt) for size in inputs))
            return graph

        add = torch.compile(lambda x: x + 1, backend=backend)
        for size in sizes:
            add(torch.ones(size))
        assert dynamo.recompile_limit == limit
        assert compiled == ([False] * 3 if ramp else [False, True])
