"""Hugging Face Trainer: bf16=True (autocast over float32 weights), its default AdamW and clipping."""

# pyright: reportMissingImports=false
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from benchmarks.peers.transformers_loop import llama
from benchmarks.peers.worker import Orders, serve


class Rows(IterableDataset):
    """The worker's own sequences, one at a time, as Trainer wants them."""

    def __init__(self, orders: Orders):
        self.orders = orders

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        while True:
            for ids in self.orders.host_batch()[0]:
                yield {"input_ids": ids, "labels": ids}


class Listen(TrainerCallback):
    """Orders are taken before the first step and after each."""

    def __init__(self, orders: Orders):
        self.orders = orders
        self.trainer: Any = None

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.orders.ready()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.orders.after_step(self.trainer.last_loss)


class WithLoss(Trainer):
    """Trainer that remembers the loss of its last step."""

    last_loss: Any = float("nan")

    def training_step(self, *arguments: Any, **keywords: Any) -> Any:
        self.last_loss = super().training_step(*arguments, **keywords)
        return self.last_loss


def train(orders: Orders) -> None:
    """Options: compile, recompute."""
    job = orders.job
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=1 << 30, per_device_train_batch_size=job.batch, learning_rate=job.learning_rate,
            lr_scheduler_type="constant", bf16=True, use_cpu=job.device == "cpu", torch_compile=job.compiled,
            gradient_checkpointing=job.recomputed, logging_strategy="no", save_strategy="no", report_to=[], disable_tqdm=True,
        )  # fmt: skip
        listen = Listen(orders)
        trainer = WithLoss(model=llama(job, orders.device), args=arguments, train_dataset=Rows(orders), callbacks=[listen])
        listen.trainer = trainer
        trainer.train()


if __name__ == "__main__":
    torch.manual_seed(0)
    serve(train)
