"""What one rank trains with, checked before a file is written or a process group is started."""

from dataclasses import dataclass
from pathlib import Path

import torch

from data.corpus.stream import BatchShape, Stream
from data.corpus.validation import Validation
from launch import runtime
from launch.batches import BEGINNING, ahead, grid_of, micro_batches, total_batches
from launch.config import RunConfig
from launch.config_checks import check_lengths
from launch.preflight import begin_run, check_start
from model.parallel.mesh import ranks_along
from trainer.config import TrainConfig
from trainer.monitoring.progress import plural
from trainer.state import State

MAX_EPOCHS = 4.0
"""Passes over a corpus after which repeated text is worth less than new text (Muennighoff et al. 2023, arXiv 2305.16264)."""


@dataclass(frozen=True)
class RunData:
    """The training and validation text of one rank."""

    train: Stream
    validation: Validation | None

    def close(self) -> None:
        """Close all files."""
        self.train.close()
        if self.validation is not None:
            self.validation.close()

    def remarks(self, config: RunConfig, begun: State = BEGINNING) -> list[str]:
        """What a reader of the losses of a run, which has reached `begun`, should know, one sentence each."""
        repeated = [
            f"data.train: '{path}' is read {epochs:.1f} times over in {plural(config.train.steps, 'update')}"
            for path, epochs in self.train.epochs(total_batches(config.train, begun))
            if epochs > MAX_EPOCHS
        ]
        return repeated + self._remarks_on_packing() + self._remarks_on_validation()

    def _remarks_on_packing(self) -> list[str]:
        samples = self.train.samples
        packed = [(c, packing) for c, packing in enumerate(samples.packings) if packing is not None]
        return [
            f"data.train: '{samples.corpora[c].directory}' is {plural(packing.rows, 'row')} of whole documents, "
            f"{samples.padding(c):.2%} of them padding; "
            f"{plural(packing.cut, 'document is longer than a row', 'documents are longer than a row')} and cut"
            for c, packing in packed
        ]

    def _remarks_on_validation(self) -> list[str]:
        if self.validation is None:
            return []
        trained_on = {corpus.manifest.fingerprint for corpus in self.train.samples.corpora}
        shared = [corpus.directory for corpus in self.validation.corpora if corpus.manifest.fingerprint in trained_on]
        return [
            *(f"data.validation: '{path}' is also trained on, so its loss is not that of unseen text" for path in shared),
            *self.validation.remarks(),
        ]


@dataclass(frozen=True)
class RankInputs:
    """One rank before it has met the others."""

    asked: RunConfig
    """The configuration as the user wrote it."""
    config: RunConfig
    """The same, with the values of the resumed checkpoint for training keys that were left unset (launch/resume.py)."""
    world: runtime.World
    device: torch.device
    data: RunData

    @property
    def directory(self) -> Path:
        """run.dir."""
        return Path(self.config.run.dir)

    @property
    def log(self) -> Path:
        """The log of this rank."""
        return self.directory / "logs" / f"rank-{self.world.rank}.log"


def check_inputs(asked: RunConfig, world: runtime.World) -> RankInputs:
    """Check everything that can be checked, open the data and prepare this process.

    Raises:
        ValueError, FileNotFoundError, PermissionError: a mistake of the user's, in one sentence.
    """
    begun = begin_run(asked, world)
    device = runtime.choose_device(begun.config.run.device, world)
    data = open_data(begun.config, world.rank, world.world_size, device.type == "cuda", begun.state)
    check_start(begun, world, device, data.train)
    runtime.prepare_process(device, world, begun.config.run.deterministic)
    return RankInputs(asked, begun.config, world, device, data)


def batch_shape(train: TrainConfig, first_batch: int = 0) -> BatchShape:
    """The batches of a run, as the data know them, from a batch on."""
    sizes = train.global_batch_size, train.micro_batch_size, tuple(train.batch_ramp)
    return BatchShape(train.sequence_length, *sizes, first_batch, tuple(train.length_ramp))


def open_data(
    config: RunConfig, rank: int, world_size: int, pin_memory: bool = False, begun: State = BEGINNING
) -> RunData:  # fmt: skip
    """The training and validation text of this rank.

    Args:
        pin_memory: for a device that copies while it computes.
        begun: what the run has reached; only later batches have to divide over the ranks.

    Raises:
        ValueError, FileNotFoundError: the world fits no layout, or the data are not there or not ours.
    """
    micro_batches(ahead(config, begun), world_size)
    check_lengths(config)
    train = config.train
    sharers = ranks_along(["data"], rank, grid_of(config.parallel, world_size))
    share = (sharers.index(rank), len(sharers))
    stream = Stream(config.data, "train", batch_shape(train, begun.batch), *share, config.run.seed, pin_memory)
    pieces = max(corpus.manifest.vocab_size for corpus in stream.samples.corpora)
    if pieces > config.model.vocab_size:
        raise ValueError(
            f"the tokenizer of the shards has {pieces} pieces, more than model.vocab_size = {config.model.vocab_size}; "
            "set model.vocab_size to at least that"
        )
    if not config.data.sources("validation"):
        return RunData(stream, None)
    evaluate = config.evaluate
    validation = Validation(
        config.data, train.sequence_length, train.micro_batch_size, evaluate.contexts, evaluate.tokens, *share
    )
    if validation.tokenizer_fingerprint != stream.tokenizer_fingerprint:
        raise ValueError("data.validation and data.train were made with different tokenizers: prepare them with the same one")
    return RunData(stream, validation)
