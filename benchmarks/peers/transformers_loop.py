"""Hugging Face transformers with the loop of its documentation: bf16 weights, fused AdamW, clipping to 1."""

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.peers.worker import Job, Orders, serve, step_for_ever


def llama(job: Job, device: torch.device) -> LlamaForCausalLM:
    """The model, random, float32, in its own default attention (scaled_dot_product_attention)."""
    config = LlamaConfig(**job.model, max_position_embeddings=job.length, use_cache=False, attention_bias=False)
    with device:
        return LlamaForCausalLM(config)


def train(orders: Orders) -> None:
    """Options: compile (the whole, or "layers" one by one, which takes seconds where the whole takes minutes), recompute."""
    job = orders.job
    model: Any = llama(job, orders.device)
    model = model.to(torch.bfloat16)
    if job.recomputed:
        model.gradient_checkpointing_enable()
    model.train()
    forward = torch.compile(model) if job.options.get("compile") is True else model
    if job.options.get("compile") == "layers":
        for layer in model.model.layers:
            layer.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=job.learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(inputs: Tensor, targets: Tensor) -> Tensor:
        loss = forward(input_ids=inputs, labels=targets, shift_labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    step_for_ever(orders, step)


if __name__ == "__main__":
    torch.manual_seed(0)
    serve(train)
