"""A small prepared corpus and a run configuration over it."""

import random
from pathlib import Path

import pytest
import torch

from data.corpus.stream import Stream
from data.ingest.prepare import PrepareOptions, prepare
from data.storage import open_store
from data.tokenizer.train import train_tokenizer
from launch.config import RunConfig
from launch.inputs import batch_shape
from launch.load_config import load_config
from launch.toml import as_toml
from model.decoder import Decoder
from model.initialization import initialise
from model.parallel.layers import serial_kit
from trainer.checkpoint.api import CheckpointMeta, Checkpoints
from trainer.checkpoint.rectangles import Shard
from trainer.config import CheckpointConfig

WORDS = [
    "def",
    "return",
    "import",
    "self",
    "for",
    "in",
    "range",
    "print",
    "lambda",
    "yield",
    "class",
    "while",
    "if",
    "else",
    "not",
    "None",
    "True",
    "is",
    "and",
    "or",
]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with tokenizer/, shards/train/ and shards/validation/: 200 documents, 512 pieces."""
    directory = tmp_path_factory.mktemp("corpus")
    draw = random.Random(0)
    for number in range(200):
        lines = (" ".join(draw.choices(WORDS, k=draw.randint(3, 9))) for _ in range(draw.randint(5, 40)))
        (directory / f"text-{number:03d}.txt").write_text("\n".join(lines) + f"\n# {number}\n")
    inputs = [str(directory / "*.txt")]
    train_tokenizer(inputs, str(directory / "tokenizer"), 330)
    prepare(inputs, str(directory / "tokenizer"), str(directory / "shards"), PrepareOptions(validation_fraction=0.1))
    return directory


@pytest.fixture
def configuration(corpus: Path, tmp_path: Path) -> str:
    """The TOML file of a small run over the corpus, whose directory is tmp_path/run."""
    text = f"""
        [run]
        dir = "{tmp_path}/run"
        device = "cpu"
        [model]
        vocab_size = 330
        hidden_size = 32
        intermediate_size = 64
        num_hidden_layers = 2
        num_attention_heads = 4
        num_key_value_heads = 2
        [data]
        tokenizer = "{corpus}/tokenizer"
        train = "{corpus}/shards/train"
        [optimizer]
        name = "adamw"
        [schedule]
        warmup_steps = 2
        decay_steps = 100
        [train]
        steps = 12
        sequence_length = 32
        global_batch_size = 8
        micro_batch_size = 2
        precision = "fp32"
        [checkpoint]
        every_steps = 4
        [log]
        every_steps = 1
        tensorboard = false
    """

    path = tmp_path / "run.toml"
    path.write_text("\n".join(line.strip() for line in text.splitlines()))
    return str(path)


def save_checkpoint(config: RunConfig, step: int, batch: int | None = None, tokens: int = 0) -> str:
    """A checkpoint of no weights in the directory of a run, with the plan of its data; its path."""
    stream = Stream(config.data, "train", batch_shape(config.train, 1 << 30), 0, 1, config.run.seed)
    extra = {"batch": step if batch is None else batch, "data_plan": stream.plan().record()}
    stream.close()
    directory = Path(config.run.dir) / "checkpoints"
    kept = Checkpoints(open_store, directory, CheckpointConfig(asynchronous=False), None, lambda text: None)
    values = torch.zeros(2)
    kept.save(
        [Shard("weight/w", (2,), (2,), (0,), 0, values)],
        CheckpointMeta(step, tokens, config.model_dump(mode="json"), extra=extra),
    )
    kept.close()
    (Path(config.run.dir) / "config.toml").write_text(as_toml(config.model_dump(mode="json", exclude_unset=True)))
    return str(directory / f"step-{step:08d}")


@pytest.fixture
def run_directory(configuration: str, corpus: Path, tmp_path: Path) -> Path:
    """A run with one checkpoint of random weights."""
    config = load_config(configuration, [f"data.validation={corpus}/shards/validation", "evaluate.tokens=512"])
    decoder = Decoder(config.model, config.position, 32, serial_kit())
    initialise(decoder, 5)
    shards = [
        Shard(f"weight/{name}", tuple(p.shape), tuple(p.shape), (0,) * p.dim(), 0, p.detach().reshape(-1))
        for name, p in decoder.named_parameters()
    ]
    kept = Checkpoints(open_store, tmp_path / "run/checkpoints", CheckpointConfig(asynchronous=False), None, lambda text: None)
    kept.save(shards, CheckpointMeta(3, 99, config.model_dump(mode="json")))
    kept.close()
    return tmp_path / "run"
