"""Largest logits and the rows that make them, against whole matrices of scores in float64."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from model.attention.kernels.reference import reference_attention
from model.attention.logits import LogitRows
from model.positions.packing import PackedDocuments, pack_documents
from tests.model.oracle import MAPS, make_layer, positions_of

MLA = {"attention": "mla", "kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
KINDS = {
    "mha": {},
    "biases": {"attention_bias": "all"},
    "gqa": {"num_key_value_heads": 2, "attention_bias": "qkv", "query_pre_attn_scalar": 3.0},
    "mqa": {"num_key_value_heads": 1},
    "mla": MLA,
    "mla-lora": MLA | {"q_lora_rank": 9},
}
BOUNDARIES = torch.tensor([0, 3, 20, 29, 40], dtype=torch.int32)


def inputs_of(layer, h_TD: Tensor, positions):
    (part,) = layer.parts(*layer.project(h_TD, positions), positions=positions)
    return part.inputs


def products(layer, inputs, far: bool) -> Tensor:
    """Of all queries and keys of one region, [B, n, S, S]."""
    q, k = (inputs.far_q, inputs.far_k) if far else (inputs.near_q, inputs.near_k)
    return torch.einsum("binh,bjnh->bnij", q, k.repeat_interleave(q.shape[2] // k.shape[2], 2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("position", ["rope", "none", "yarn-factors", "rerope-logn", "inverse"])
@torch.no_grad()
def test_logits_of_a_head_follow_its_factor_and_no_other_does(position: str, kind: str):
    config, layer = make_layer(**KINDS[kind])
    positions, h = positions_of(config, MAPS[position]), torch.randn(40, 16, dtype=torch.float64)
    before = inputs_of(layer, h, positions)
    factor_N, parameters = torch.tensor([0.25, 1.0, 0.03, 1.0], dtype=torch.float64), dict(layer.named_parameters())
    for name, rows in layer.logit_rows().items():
        factor_R = factor_N[rows.head_R] ** rows.power_R
        parameters[f"{name}.weight"].mul_(factor_R[:, None])
        if f"{name}.bias" in parameters:
            parameters[f"{name}.bias"].mul_(factor_R)
    after = inputs_of(layer, h, positions)
    assert (after.far_q is not None) == (position in ("rerope-logn", "inverse"))
    for far in (False, True)[: 1 + (after.far_q is not None)]:
        want = products(layer, before, far) * factor_N[:, None, None]
        torch.testing.assert_close(products(layer, after, far), want, rtol=0, atol=1e-12 * want.abs().max().item())
    assert torch.equal(after.v, before.v)
    if kind == "mha":  # shared, so that neither grows
        torch.testing.assert_close(
            after.near_k.norm() / before.near_k.norm(), after.near_q.norm() / before.near_q.norm(), rtol=0.2, atol=0
        )
    if kind in ("gqa", "mqa"):  # the key serves other heads
        assert torch.equal(after.near_k, before.near_k)


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("position", ["rope", "rerope-logn", "inverse"])
def test_the_record_is_the_largest_log_sum_exp_of_each_head(position: str, kind: str, window: int | None, packed: bool):
    config, layer = make_layer(**KINDS[kind], sliding_window=window)
    positions = positions_of(config, MAPS[position], cu_seqlens=BOUNDARIES if packed else None)
    layer.record_logits(torch.device("cpu"))
    layer.largest_logit_n.fill_(float("-inf"))
    wanted, largest = [], []
    for _ in range(2):
        h = 3 * torch.randn(40, 16, dtype=torch.float64)
        layer(h, positions)
        inputs = inputs_of(layer, h, positions)
        arguments = (
            layer.scale,
            layer.layer_positions.kernel_window(positions),
            pack_documents(BOUNDARIES, None, lists=False) if packed else None,
        )
        wanted.append(reference_attention(inputs, *arguments)[1].amax(dim=(0, 1)))
        largest.append(largest_scores(inputs, *arguments))
    want, exact = torch.stack(wanted).amax(dim=0), torch.stack(largest).amax(dim=0)
    torch.testing.assert_close(layer.largest_logit_n, want, rtol=0, atol=1e-12)
    assert (exact <= want).all() and (want <= exact + torch.tensor(20.0).log()).all()


def largest_scores(inputs, scale: float, window: int | None, documents: PackedDocuments | None) -> Tensor:
    """Largest visible score of each head: as the temperature falls, the log-sum-exp times it."""
    cold = 1e4
    return reference_attention(inputs, scale * cold, window, documents)[1].amax(dim=(0, 1)) / cold - 1e-12


def test_what_has_no_backward_is_not_recorded_and_what_is_recomputed_counts_once():
    config, layer = make_layer()
    positions, h = positions_of(config), torch.randn(40, 16, dtype=torch.float64, requires_grad=True)
    layer.record_logits(torch.device("cpu"))
    assert layer.largest_logit_n.shape == (4,) and layer.largest_logit_n.dtype == torch.float64
    layer.largest_logit_n.fill_(float("-inf"))
    with torch.no_grad():
        layer(100 * h, positions)
    assert layer.largest_logit_n.tolist() == [float("-inf")] * 4
    checkpoint(partial(layer, positions=positions), h, use_reentrant=False, preserve_rng_state=False).sum().backward()
    recorded = layer.largest_logit_n.clone()
    layer(h, positions)
    assert torch.equal(layer.largest_logit_n, recorded) and recorded.isfinite().all()


def test_the_output_has_the_bits_that_it_has_without_a_record():
    config, layer = make_layer(num_key_value_heads=2)
    for position in ("rope", "rerope"):
        positions, h = positions_of(config, MAPS[position]), torch.randn(40, 16, dtype=torch.float64, requires_grad=True)
        results = []
        for device in (None, torch.device("cpu")):
            layer.largest_logit_n = None
            if device is not None:
                layer.record_logits(device)
            out = layer(h, positions)
            results.append([out, *torch.autograd.grad(out.sin().sum(), [h, *layer.parameters()])])
        assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_rows_of_heads_follow_each_other():
    rows = LogitRows.of_heads(2, (2, 0.5), (1, 1.0))
    assert rows.head_R.tolist() == [0, 0, 0, 1, 1, 1] and rows.power_R.tolist() == [0.5, 0.5, 1.0] * 2
