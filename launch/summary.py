"""What a run says of itself when it starts."""

import time

import torch

from launch.config import RunConfig, micro_batches
from launch.predict import ACCELERATORS
from model.flops import parameters
from model.parallel import Topology
from trainer.engine import Engine
from trainer.progress import count
from trainer.zero import Zero


def summary(config: RunConfig, topology: Topology, engine: Engine) -> list[str]:
    """Model, layout, tokens a step, memory: a few lines."""
    model, train, parallel = config.model, config.train, config.parallel
    parts = parameters(model)
    kind = model.attention if model.attention == "mla" else _heads(model.num_attention_heads, model.kv_heads)
    state = sum(shard.values.numel() * shard.values.element_size() for shard in engine.shards())
    weights = sum(p.numel() * p.element_size() for p in engine.model.parameters())
    sharing = "fold" if parallel.engine == "fold" else f"ZeRO {parallel.zero_stage}"
    if isinstance(engine, Zero) and engine.hpz > 1:
        sharing += f", a copy of the weights on every {engine.hpz} data ranks (hpZ)"
    return [
        f"model      {count(parts['total'])} parameters: {model.num_hidden_layers} layers of {model.hidden_size}, {kind}, "
        f"{config.position.kind}, {'tied' if model.tie_word_embeddings else 'untied'} head",
        f"layout     {topology.world_size} x {topology.device.type}: tensor {topology.tensor_parallel_size}, "
        f"data {topology.data_parallel_size}, {sharing}, {train.precision}",
        f"update     {count(train.batch_tokens)} tokens = {train.global_batch_size} x {train.sequence_length}, "
        f"{micro_batches(config, topology.world_size)} micro-batches a rank, "
        f"{config.optimizer.name} at {config.optimizer.rate:g}",
        f"memory     {weights / 2**20:.1f} MiB of weights and {state / 2**20:.1f} MiB of training state on this rank",
        f"goal       {train.steps} steps, {count(train.steps * train.batch_tokens)} tokens; all of it in {config.run.dir}",
    ]


def _heads(queries: int, keys: int) -> str:
    name = "MHA" if queries == keys else "MQA" if keys == 1 else "GQA"
    return f"{name} {queries}" if queries == keys else f"{name} {queries}:{keys}"


def peak_flops(device: torch.device, precision: str) -> float:
    """Operations a second of one device: the data sheet of a known GPU, else what a matrix product reaches here."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device).lower()
        for known in ACCELERATORS.values():
            if known.name in name.replace(" ", ""):
                return known.matrix_flops
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    size = 4096 if device.type == "cuda" else 512
    a = torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(4):
            torch.matmul(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - begin) / 4)
    return 2.0 * size**3 / best
