"""The denominator of MFU, of the number format that is trained in; the attention backends that a run names."""

import time

import pytest
import torch

from launch import summary
from launch.load_config import build_config
from launch.summary import measured_flops, peak_flops
from model.sizes import parameter_counts
from trainer.monitoring.progress import format_count

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(
    ("board", "precision", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 80GB HBM3", "fp32", 67),
        ("NVIDIA A100-SXM4-40GB", "fp32", 19.5),
        ("NVIDIA GeForce RTX 4090", "fp32", 82.6),
        ("NVIDIA H100 PCIe", "bf16", 0.001),  # not in the table: measured
        ("NVIDIA T4", "fp32", 0.002),
    ],
)
def test_a_known_gpu_has_the_peak_of_its_data_sheet(board: str, precision: str, teraflops: float, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: board)
    measured = {torch.bfloat16: 1e9, torch.float32: 2e9}
    monkeypatch.setattr(summary, "measured_flops", lambda device, dtype: measured[dtype])
    assert peak_flops(CUDA, precision) == teraflops * 1e12


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_cpu_has_what_a_product_of_that_format_reaches(precision: str, monkeypatch):
    seen = []
    monkeypatch.setattr(summary, "measured_flops", lambda device, dtype: seen.append((device, dtype)) or 1.0)
    assert peak_flops(CPU, precision) == 1.0
    assert seen == [(CPU, torch.bfloat16 if precision == "bf16" else torch.float32)]


def test_a_measured_peak_is_that_of_the_best_of_many_products():
    """Within the noise of a busy machine: never far below what single products reach."""
    a, best = torch.randn(512, 512), 0.0
    for _ in range(20):
        begin = time.perf_counter()
        a @ a
        best = max(best, 2 * 512**3 / (time.perf_counter() - begin))
    assert 0.1 * best < measured_flops(CPU, torch.float32) < 10 * best


def test_the_backend_of_each_kind_of_layer_is_that_of_the_configuration():
    def lines(device: str = "cpu", **options: object) -> list[str]:
        train = {"sequence_length": 256, **options.pop("train", {})}  # type: ignore[dict-item]
        sizes = {"hidden_size": 64, "num_attention_heads": 4}
        return summary._attention_backends(build_config({"model": sizes, "train": train, **options}), device)

    rerope = {"kind": "rerope", "window": 64}
    assert lines() == ["causal on cpu: cpu_dense"]
    assert lines(train={"compile": True}) == ["causal on cpu: cpu_flash"]
    assert lines(train={"compile": True, "precision": "fp32"}) == ["causal on cpu: cpu_dense"]
    assert lines(position=rerope, train={"sequence_length": 1024}) == ["two regions (ReRoPE) on cpu: cpu_sdpa"]
    assert lines(position=rerope, data={"document_mask": True}) == ["packed documents, two regions (ReRoPE) on cpu: cpu_tiled"]
    shared = {"context_parallel_size": 2}
    assert lines(parallel=shared) == ["causal on cpu: cpu_tiled"]
    assert lines(parallel={**shared, "context_exchange": "heads"}) == ["causal on cpu: cpu_dense"]
    assert lines("cuda", parallel=shared) == ["causal on cuda: flash"]
    assert lines("cuda", position=rerope) == ["two regions (ReRoPE) on cuda: flash"]


def test_the_layout_shows_the_layers_of_each_stage():
    def shown(**parallel: object) -> str:
        model = {"hidden_size": 64, "num_hidden_layers": 7, "vocab_size": 512}
        return summary._pipeline(build_config({"model": model, "parallel": parallel}))

    assert shown() == ""
    assert shown(pipeline_parallel_size=2) == "pipeline 2 (1f1b, 4 + 3 layers), "
    interleaved = {"pipeline_parallel_size": 2, "pipeline_schedule": "interleaved", "pipeline_stages_per_rank": 3}
    assert shown(**interleaved) == "pipeline 2 (interleaved, 1 + 1 + 1 + 1 + 2 + 1 layers), "


def test_active_parameters_are_told_where_they_are_not_all():
    dense = build_config({"model": {"hidden_size": 64, "num_attention_heads": 4}})
    assert summary._active(parameter_counts(dense.model)) == ""
    counts = parameter_counts(dense.model.model_copy(update={"feed_forward": "moe"}))
    assert summary._active(counts) == f", {format_count(counts['active'])} active" and counts["active"] < counts["total"]


def test_a_mixture_is_told_in_a_line():
    mixed = [
        "model.feed_forward=moe",
        "model.n_routed_experts=16",
        "model.num_hidden_layers=4",
        "model.first_k_dense_replace=1",
    ]
    assert summary._mixture(build_config({}, mixed)) == "2 of 16 experts and 1 shared in 3 layers, "
    assert summary._mixture(build_config({}, [*mixed, "model.n_shared_experts=0"])) == "2 of 16 experts in 3 layers, "
    assert summary._mixture(build_config({}, [])) == ""
