"""litgpt: its model, Fabric set-up, compiled model, loss, clipping and AdamW as in litgpt/pretrain.py, in bf16-true."""

# pyright: reportMissingImports=false
import lightning as lightning_ai
import torch
from litgpt.config import Config
from litgpt.model import GPT, Block
from litgpt.utils import chunked_cross_entropy, instantiate_torch_optimizer
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

from benchmarks.peers.worker import Job, Orders, serve, step_for_ever


def sizes(job: Job) -> Config:
    """litgpt's names for the same network."""
    model = job.model
    return Config(
        name="bench", block_size=job.length, vocab_size=model["vocab_size"], padded_vocab_size=model["vocab_size"],
        n_layer=model["num_hidden_layers"], n_head=model["num_attention_heads"], n_embd=model["hidden_size"],
        n_query_groups=model["num_key_value_heads"], intermediate_size=model["intermediate_size"], rotary_percentage=1.0,
        parallel_residual=False, bias=False, norm_class_name="RMSNorm", norm_eps=1e-5, mlp_class_name="LLaMAMLP",
        rope_base=int(model.get("rope_theta", 10000)),
    )  # fmt: skip


def train(orders: Orders) -> None:
    """Options: compile, recompute (as Fabric does it for litgpt on several devices)."""
    job = orders.job
    fabric = lightning_ai.Fabric(accelerator=job.device, devices=1, precision=job.options.get("precision", "bf16-true"))
    fabric.launch()
    with fabric.init_module(empty_init=False):
        model = GPT(sizes(job))
    if job.recomputed:
        apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Block))
    if job.compiled:
        model = torch.compile(model)
    model = fabric.setup(model)
    extra = {"fused": fabric.device.type == "cuda"}
    settings = {
        "class_path": "torch.optim.AdamW",
        "init_args": {"lr": job.learning_rate, "weight_decay": 0.1, "betas": [0.9, 0.95]},
    }
    optimizer = fabric.setup_optimizers(instantiate_torch_optimizer(settings, model.parameters(), **extra))

    def step(inputs: Tensor, targets: Tensor) -> Tensor:
        logits = model(inputs)
        loss = chunked_cross_entropy(logits, targets)
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    step_for_ever(orders, step)


if __name__ == "__main__":
    torch.manual_seed(0)
    serve(train)
