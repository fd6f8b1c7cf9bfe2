"""A layer with experts against Megatron-Core's: outputs, loads and all gradients, those of auxiliary losses among them."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from model.feed_forward.moe import MixtureOfExperts
from tests.model.feed_forward.layer import SIZES, T, layer, passed, stream
from tests.ranks import run_ranks

SOFTMAX = {"scoring_func": "softmax", "router_bias": False}
LOSSES = {"router_aux_loss_coef": 10.0, "router_z_loss_coef": 0.1, "router_bias": False}
CASES: dict[str, dict[str, Any]] = {
    "softmax": {**SOFTMAX, "n_shared_experts": 0},
    "softmax, shared experts": {**SOFTMAX, "n_shared_experts": 2, "num_experts_per_tok": 3},
    "softmax, weights as scored": {**SOFTMAX, "norm_topk_prob": False, "num_experts_per_tok": 1},
    "softmax in groups": {**SOFTMAX, "norm_topk_prob": False, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 3.0},
    "sigmoid": {"routed_scaling_factor": 2.5},
    "sigmoid in groups": {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 4, "n_shared_experts": 0},
    "softmax, losses": {**SOFTMAX, **LOSSES},
    "sigmoid, losses": {**LOSSES, "num_experts_per_tok": 3},
}


def megatron_layer(ours: MixtureOfExperts) -> Any:
    """Their layer with our weights and keys, its experts one after the other. On a CPU, and without TransformerEngine, it
    wants a device (the caller patches that) and looks for a product of TransformerEngine's under a name it does not have."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
    from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
    from megatron.core.transformer.spec_utils import ModuleSpec

    moe_utils.te_general_gemm = None
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    parts = MoESubmodules(
        experts=ModuleSpec(SequentialMLP, submodules=linears), shared_experts=ModuleSpec(SharedExpertMLP, submodules=linears)
    )
    names = ("tp", "cp", "ep", "tp_cp", "tp_dp_cp", "tp_ep", "expt_tp", "expt_dp")
    groups = ProcessGroupCollection(**dict.fromkeys(names, dist.group.WORLD))
    theirs: Any = MoELayer(_megatron_config(ours), parts, pg_collection=groups)
    theirs.router.weight.data.copy_(ours.gate.weight)
    if ours.gate.config.router_bias:
        theirs.router.expert_bias.copy_(ours.gate.bias_E.detach())
    for expert, mlp in enumerate(theirs.experts.local_experts):
        stacks = (ours.experts.gate_proj, ours.experts.up_proj, ours.experts.down_proj)
        _fill(mlp, *(stack[expert] for stack in stacks))
    if ours.shared_experts is not None:
        shared = ours.shared_experts.state_dict()
        _fill(theirs.shared_experts, *(shared[f"{name}_proj.weight"] for name in ("gate", "up", "down")))
    return theirs


def _fill(mlp: Any, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor) -> None:
    mlp.linear_fc1.weight.data.copy_(torch.cat((gate_FD, up_FD)))
    mlp.linear_fc2.weight.data.copy_(down_DF)


def _megatron_config(ours: MixtureOfExperts) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    config: Any = ours.gate.config
    width, grouped = config.moe_intermediate_size, config.n_group > 1
    return TransformerConfig(
        num_layers=1, hidden_size=SIZES["hidden_size"], num_attention_heads=2, num_moe_experts=ours.count,
        ffn_hidden_size=SIZES["intermediate_size"], moe_ffn_hidden_size=width,
        moe_shared_expert_intermediate_size=config.n_shared_experts * width or None, moe_router_topk=ours.chosen,
        moe_router_score_function=config.scoring_func, moe_router_pre_softmax=not config.norm_topk_prob,
        moe_router_enable_expert_bias=config.router_bias, moe_router_topk_scaling_factor=config.routed_scaling_factor,
        moe_router_num_groups=config.n_group if grouped else None, moe_router_group_topk=config.topk_group if grouped else None,
        moe_router_load_balancing_type="seq_aux_loss" if config.router_aux_loss_coef else "none",
        moe_aux_loss_coeff=config.router_aux_loss_coef, moe_z_loss_coeff=config.router_z_loss_coef or None,
        moe_router_dtype="fp32", moe_token_dispatcher_type="allgather", add_bias_linear=False, gated_linear_unit=True,
        activation_func=F.silu, use_cpu_initialization=True, bias_activation_fusion=False,
    )  # fmt: skip


def megatron_passed(theirs: Any, h_TD: Tensor) -> dict[str, Tensor]:
    """What `passed` gives of our layer, by our names; their sequences come second."""
    h_TD = h_TD.detach().requires_grad_()
    y_SBD, _ = theirs(h_TD.view(2, T // 2, -1).transpose(0, 1).contiguous())
    y_TD = y_SBD.transpose(0, 1).flatten(0, 1)
    y_TD.backward(torch.randn(h_TD.shape, generator=torch.Generator().manual_seed(2)))
    found = {"y": y_TD.detach(), "h": h_TD.grad, "gate.weight": theirs.router.weight.grad}
    experts = list(theirs.experts.local_experts)
    first = torch.stack([_gradient(mlp.linear_fc1.weight) for mlp in experts])
    found["experts.gate_proj"], found["experts.up_proj"] = first.chunk(2, 1)
    found["experts.down_proj"] = torch.stack([_gradient(mlp.linear_fc2.weight) for mlp in experts])
    if theirs.shared_experts is not None:
        gate, up = theirs.shared_experts.linear_fc1.weight.grad.chunk(2)
        found |= {"shared_experts.gate_proj.weight": gate, "shared_experts.up_proj.weight": up}
        found["shared_experts.down_proj.weight"] = theirs.shared_experts.linear_fc2.weight.grad
    if theirs.router.enable_expert_bias:
        found["load"] = theirs.router.local_tokens_per_expert
    return found


def _gradient(weight: Tensor) -> Tensor:
    return torch.zeros_like(weight) if weight.grad is None else weight.grad


def differences(rank: int, world_size: int) -> dict[str, dict[str, tuple[float, float]]]:
    """Of each case and tensor: the norm of the difference, and that of theirs."""
    found = {}
    with patch("torch.cuda.current_device", lambda: torch.device("cpu")):
        for case, keys in CASES.items():
            ours = layer(**keys)
            ours.kit.loss_scale.fill_(1 / T)  # their losses are means over tokens
            want, got = megatron_passed(megatron_layer(ours), stream()), passed(ours, stream())
            assert got.keys() - want.keys() <= {"load"}, case
            found[case] = {name: ((got[name] - value).norm().item(), value.norm().item()) for name, value in want.items()}
    return found


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, tuple[float, float]]]:
    """A process of its own: Megatron's process groups and patches stay there."""
    return run_ranks(differences, 1)[0]


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_megatron(case: str, measured: dict[str, dict[str, tuple[float, float]]]):
    for name, (difference, norm) in measured[case].items():
        assert difference <= 1e-5 * norm and norm > 0, name
