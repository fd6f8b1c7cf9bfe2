"""Megatron-Core's layers: a split network against the whole one, and each interface of Megatron that nobody promised."""

import zlib

import pytest
import torch

from model.config import ModelConfig
from model.decoder import Decoder
from model.initialization import initialise
from model.parallel import tensor
from model.parallel.layers import serial_kit
from model.parallel.mesh import make_kit, make_mesh
from model.parameters import local_slice
from model.positions.config import PositionConfig
from tests.model.libraries import relied_on
from tests.ranks import run_ranks

GQA = {"num_attention_heads": 4, "num_key_value_heads": 2}
CASES = {
    "mha": {"num_attention_heads": 4},
    "gqa": GQA,
    "mqa": {"num_attention_heads": 4, "num_key_value_heads": 1},
    "untied": {**GQA, "tie_word_embeddings": False},
    "projection": {**GQA, "tied_head": "projection"},
    "rms": {**GQA, "num_key_value_heads": 1, "qk_norm": "rms"},
    "biases, split kv heads": {**GQA, "attention_bias": "all", "mlp_bias": True},
    "biases, whole kv heads": {"num_attention_heads": 4, "num_key_value_heads": 1, "attention_bias": "qkv", "mlp_bias": True},
    "post": {**GQA, "norm_placement": "post", "qk_norm": "rms-all-heads", "attention_bias": "all"},
    "post, whole kv heads": {
        "num_attention_heads": 4, "num_key_value_heads": 1, "norm_placement": "post", "qk_norm": "rms-all-heads",
    },
    "sandwich": {
        **GQA, "norm_placement": "sandwich", "qk_norm": "rms", "zero_centered_gains": True, "scale_embedding": True,
        "query_pre_attn_scalar": 3.0, "feed_forward": "geglu",
    },
    "zero-centred, all heads": {**GQA, "qk_norm": "rms-all-heads", "zero_centered_gains": True},
    "zero-centred mla": {
        "num_attention_heads": 4, "attention": "mla", "q_lora_rank": 12, "kv_lora_rank": 16, "mlp_bias": True,
        "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "zero_centered_gains": True,
    },
    "mla": {
        "num_attention_heads": 4, "attention": "mla", "q_lora_rank": 12, "kv_lora_rank": 16,
        "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
    },
}  # fmt: skip


def config(case: str) -> ModelConfig:
    return ModelConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, initializer_range=0.2, **CASES[case]
    )


@torch.no_grad()
def shake_vectors(model: Decoder) -> None:
    for name, parameter in model.named_parameters():
        spec = parameter.spec  # type: ignore[attr-defined]
        if spec.kind in ("gain", "bias"):
            full = 0.3 * torch.randn(spec.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
            (length,), (start,) = local_slice(spec, model.kit.size, model.kit.rank)
            parameter += full[start : start + length]


def loss_and_gradients(model: Decoder) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    tokens_BS = torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(1))
    loss, _ = model(tokens_BS[:, :-1], tokens_BS[:, 1:])
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def compare_split_with_whole(rank: int, world_size: int, sequence_parallel: bool) -> None:
    mesh = make_mesh(world_size, torch.device("cpu"))
    for case in CASES:
        whole = Decoder(config(case), PositionConfig(), 16, serial_kit(torch.float64))
        kit = make_kit(mesh, sequence_parallel, torch.float64)
        split = Decoder(config(case), PositionConfig(), 16, kit)
        initialise(whole, 0)
        initialise(split, 0)
        for model in (whole, split):  # gains and biases of their own in every channel, which all start alike
            shake_vectors(model)
        (want_loss, want), (loss, got) = loss_and_gradients(whole), loss_and_gradients(split)
        torch.testing.assert_close(loss, want_loss, rtol=1e-12, atol=0)
        assert got.keys() == want.keys()
        for name, parameter in split.named_parameters():
            shape, start = local_slice(parameter.spec, kit.size, kit.rank)
            wanted = want[name]
            for dimension, (length, offset) in enumerate(zip(shape, start, strict=True)):
                wanted = wanted.narrow(dimension, offset, length)
            torch.testing.assert_close(
                got[name], wanted, rtol=1e-9, atol=1e-11, msg=lambda text, where=f"{case} {name}": f"{where}: {text}"
            )


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_loss_and_gradients_do_not_depend_on_the_tensor_parallel_size(sequence_parallel: bool):
    run_ranks(compare_split_with_whole, 2, sequence_parallel)


SETTINGS = tensor.megatron_settings(1, torch.float64)
"""Without process groups: a collective of Megatron's own fails for want of one."""
ROW = dict(config=SETTINGS, init_method=tensor.identity, bias=False, input_is_parallel=True, skip_bias_add=True)


def row_layers_leave_the_sum_out() -> None:
    use = "model.parallel.tensor.row_layer leaves the sum over ranks to model.parallel.collectives"
    with relied_on("megatron-core", "RowParallelLinear.explicit_expert_comm", use):
        assert tensor.RowParallelLinear(6, 4, **ROW).explicit_expert_comm is False, "it is no attribute of a layer"
        layer, x_TF = tensor.row_layer(6, 4, SETTINGS, None), torch.randn(3, 6, dtype=torch.float64)
        torch.nn.init.normal_(layer.weight)
        torch.testing.assert_close(layer(x_TF), x_TF @ layer.weight.T)


def column_layers_leave_the_sum_of_gradients_out() -> None:
    use = "model.parallel.tensor.column_layer leaves the sum of the input's gradient to column_input"
    with relied_on("megatron-core", "ColumnParallelLinear(disable_grad_reduce=True)", use):
        layer, x_TD = tensor.column_layer(6, 4, SETTINGS, None), torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
        torch.nn.init.normal_(layer.weight)
        layer(x_TD).sum().backward()
        torch.testing.assert_close(x_TD.grad, layer.weight.sum(0).expand(3, 6))


INTERFACES = [
    row_layers_leave_the_sum_out,
    column_layers_leave_the_sum_of_gradients_out,
]


@pytest.mark.parametrize("check", INTERFACES)
def test_megatron_has_what_tiglon_relies_on(check):
    check()


class RenamedFlag(tensor.RowParallelLinear):
    """A Megatron whose row layers reduce whatever the flag says."""

    def forward(self, input_):
        self.explicit_expert_comm = False
        return super().forward(input_)


class IgnoredSwitch(tensor.ColumnParallelLinear):
    """A Megatron whose column layers sum the gradient whatever the switch says."""

    def __init__(self, *args, disable_grad_reduce=False, **kwargs):
        super().__init__(*args, **kwargs)


PLANTED = {
    "sum whatever the flag says": (row_layers_leave_the_sum_out, "_Row", RenamedFlag, "explicit_expert_comm"),
    "sum of gradients": (column_layers_leave_the_sum_of_gradients_out, "_Column", IgnoredSwitch, "disable_grad_reduce"),
}


@pytest.mark.parametrize("check, name, planted, interface", PLANTED.values(), ids=PLANTED)
def test_another_megatron_is_seen(check, name, planted, interface, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tensor, name, planted)
    with pytest.raises(pytest.fail.Exception, match=rf"^megatron-core [\w.+]+: .*{interface}.* no longer .*model\.parallel.*$"):
        check()
