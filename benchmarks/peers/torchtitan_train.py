"""torchtitan: its own Trainer and train step (FSDP2's mixed precision, compiled blocks and loss), fed the worker's tokens.

Its released package is for accelerators: without one it fails as it is imported, and the row says why.
"""

# pyright: reportMissingImports=false
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.distributed.activation_checkpoint import FullAC
from torchtitan.models import llama3
from torchtitan.models.common.config_utils import decoder_vocab_size
from torchtitan.models.llama3.config_registry import llama3_debugmodel

from benchmarks.peers.worker import Job, Orders, serve


class NoTokenizer(BaseTokenizer):
    """The tokens are there already."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Any = None, **_: Any):
        super().__init__()
        self.eos_id = 0

    def encode(self, *_: Any, **__: Any) -> list[int]:
        return []

    def decode(self, *_: Any, **__: Any) -> str:
        return ""

    def get_vocab_size(self) -> int:
        return 0


class Tokens(BaseDataLoader):
    """The worker's own batches."""

    orders: Orders

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        pass

    def __init__(self, config: Any = None, **_: Any):
        pass

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        while True:
            inputs, targets = self.orders.host_batch()
            positions = torch.arange(inputs.shape[1], dtype=torch.int32).expand(inputs.shape).contiguous()
            yield {"input": inputs, "positions": positions}, targets

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


def network(job: Job) -> Any:
    """Llama 3 of torchtitan with the job's sizes, as a flavour of its registry."""
    sizes, like = job.model, llama3.llama3_configs["8B"](attn_backend="sdpa")
    dim, vocabulary = sizes["hidden_size"], sizes["vocab_size"]
    heads = sizes["num_attention_heads"]
    rope = replace(
        like.layers[0].attention.rope, dim=dim // heads, max_seq_len=job.length, theta=sizes.get("rope_theta", 10000.0)
    )
    layers = llama3._build_llama3_layers(
        n_layers=sizes["num_hidden_layers"], dim=dim, n_heads=heads, n_kv_heads=sizes["num_key_value_heads"],
        hidden_dim=sizes["intermediate_size"], rope=rope, fuse_qkv=True, attn_backend="sdpa",
    )  # fmt: skip
    config = replace(
        like, dim=dim, vocab_size=vocabulary, layers=layers, norm=replace(like.norm, normalized_shape=dim),
        tok_embeddings=replace(like.tok_embeddings, num_embeddings=vocabulary, embedding_dim=dim),
        lm_head=replace(like.lm_head, in_features=dim, out_features=vocabulary),
    )  # fmt: skip
    llama3.llama3_configs["bench"] = lambda **_: config
    return llama3.model_registry("bench", attn_backend="sdpa")


def train(orders: Orders) -> None:
    """Options: compile, recompute."""
    job = orders.job
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29555}.items():
        os.environ.setdefault(name, str(value))
    Tokens.orders = orders
    spec = network(job)
    config = llama3_debugmodel()
    config.model_spec = spec
    config.loss.loss_fn.global_vocab_size = decoder_vocab_size(spec)
    config.tokenizer, config.dataloader = NoTokenizer.Config(), Tokens.Config()
    config.dump_folder = tempfile.mkdtemp()
    config.training.local_batch_size, config.training.seq_len, config.training.steps = job.batch, job.length, 1 << 30
    config.activation_checkpoint = FullAC.Config() if job.recomputed else None
    config.compile.enable = job.compiled
    config.validator.enable = config.checkpoint.enable = False
    config.metrics.log_freq = 1 << 30
    trainer = config.build()
    losses: list[Any] = [float("nan")]
    forward_backward = trainer.forward_backward_step

    def remembered(**keywords: Any) -> Any:
        losses[0] = forward_backward(**keywords)
        return losses[0]

    trainer.forward_backward_step = remembered
    batches = trainer.batch_generator(trainer.dataloader)
    orders.ready()
    while True:
        trainer.step += 1
        trainer.train_step(batches)
        orders.after_step(losses[0])


if __name__ == "__main__":
    torch.manual_seed(0)
    serve(train)
