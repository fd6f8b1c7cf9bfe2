"""A trained network read from a checkpoint, for tiglon.py and for commands that evaluate it or generate with it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
import typer
from pydantic import ValidationError

from data.config import DataConfig
from data.corpus.validation import Validation
from data.tokenizer.tokenizer import Tokenizer
from launch.checkpoints import find_checkpoint, load_checkpoint, read_checkpoint_manifest
from launch.config import RunConfig
from launch.config_checks import check_position
from launch.config_mistakes import validation_sentence
from launch.kept_tokenizer import as_list, open_kept
from launch.load_config import build_config
from launch.versions import translate_position
from model.decoder import Decoder
from model.parallel.layers import serial_kit
from model.parallel.mesh import Mesh
from model.positions.config import PositionConfig
from model.sizes import check_held
from trainer.engines.base import make_shards
from trainer.monitoring.progress import plural
from trainer.optimizers.expert_balance import ExpertBalance
from trainer.optimizers.fragments import whole_fragments

RunOrCheckpoint = Annotated[str, typer.Argument(help="Checkpoint, or a run: its newest one.", metavar="RUN_OR_CHECKPOINT")]
PositionOption = Annotated[str, typer.Option(help="Position map, as rerope,window=512; default the trained one.")]
DeviceOption = Annotated[str, typer.Option(help="auto (cuda where there is one), cpu or cuda.")]

DEFAULT_NEW_TOKENS = 200


@dataclass(frozen=True)
class Trained:
    """A network with the weights of one checkpoint."""

    path: str
    """The checkpoint."""
    step: int
    config: RunConfig
    """As the checkpoint records it."""
    decoder: Decoder
    end_tokens: tuple[int, ...] = ()
    """Ids at which an imported model ends a text, as its config.json says."""

    @property
    def position(self) -> PositionConfig:
        """The map that it is evaluated with unless another is asked for: evaluate.position of the run, else the trained one."""
        return self.config.evaluate.position or self.config.position


def open_checkpoint(address: str, device: torch.device, dtype: torch.dtype | None = None) -> Trained:
    """Read the network of a checkpoint, or of a run's newest one.

    Args:
        dtype: of the weights, float32 or bfloat16; None = the precision it was trained in (train.precision).

    Raises:
        FileNotFoundError, ValueError: one sentence.
    """
    path = find_checkpoint(address)
    manifest = read_checkpoint_manifest(path)
    meta = manifest.meta
    config = build_config(meta.config, where=f"the configuration in {path}")
    prefix = "weight/"
    held = {name.removeprefix(prefix): shape for name, shape in manifest.shapes.items() if name.startswith(prefix)}
    check_held(config.model, held, path)
    trained_in = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    unpadded = config.model.model_copy(update={"pad_vocab_to_multiple": 1})  # a checkpoint has no padding
    with torch.device(device):
        decoder = Decoder(unpadded, config.position, config.train.sequence_length, serial_kit(dtype or trained_in))
    alone = Mesh()
    weights = make_shards(whole_fragments(decoder.owned_parameters(), alone), alone, partitioned=False)
    load_checkpoint(path, weights + ExpertBalance(decoder, alone).shards())
    ends = as_list(meta.extra.get("token_ids", {}).get("eos_token_id"))
    return Trained(path, meta.step, config, decoder, tuple(ends))


def check_chunk_tokens(chunk_tokens: int | None) -> None:
    """Refuse what is no number of tokens.

    Raises:
        ValueError: below 0.
    """
    if chunk_tokens is not None and chunk_tokens < 0:
        raise ValueError(f"chunk_tokens = {chunk_tokens} must be 0 (rows pass through the network whole) or above")


def with_chunks(trained: Trained, chunk_tokens: int | None) -> Trained:
    """The same network, whose longer rows are evaluated in chunks of so many tokens; 0 = whole, None = as the run did.

    Raises:
        ValueError: below 0.
    """
    check_chunk_tokens(chunk_tokens)
    if chunk_tokens is None:
        return trained
    evaluate = trained.config.evaluate.model_copy(update={"chunk_tokens": chunk_tokens})
    return replace(trained, config=trained.config.model_copy(update={"evaluate": evaluate}))


def open_tokenizer(trained: Trained, directory: str = "") -> Tokenizer:
    """The tokenizer in `directory`; "" = that of the checkpoint: its own copy, or data.tokenizer of the run.

    Raises:
        FileNotFoundError, ValueError: there is none.
    """
    if not directory and (kept := open_kept(trained.path)):
        return kept
    found = directory or trained.config.data.tokenizer
    if not found:
        raise ValueError(f"{trained.path} names no tokenizer; give the directory of one (--tokenizer DIR)")
    return Tokenizer.load(found)


def end_tokens(trained: Trained, tokenizer: Tokenizer | None) -> frozenset[int]:
    """Ids that end a text: those of the tokenizer, if there is one, and those of the model that was imported."""
    return frozenset((*(() if tokenizer is None else tokenizer.end_tokens), *trained.end_tokens))


def open_validation(config: RunConfig, data: str, contexts: list[int], tokens: int | None) -> Validation:
    """The run's validation text, or that of the shards in `data`.

    Args:
        tokens: scored at most, 0 = all; None = evaluate.tokens of the run.

    Raises:
        ValueError: the run has no data.validation and `data` is "".
    """
    settings = config.data.model_dump() | ({"validation": data} if data else {})
    chosen = DataConfig.model_validate(settings)
    if not chosen.sources("validation"):
        raise ValueError("the run has no data.validation; give prepared shards (--data PATH)")
    budget = config.evaluate.tokens if tokens is None else tokens
    return Validation(chosen, config.train.sequence_length, config.train.micro_batch_size, contexts, budget)


def new_tokens(config: RunConfig, evaluated: PositionConfig, prompt: int, requested: int) -> int:
    """How many tokens to add to a prompt of `prompt` tokens, evaluated with that position map.

    Args:
        requested: by the user; 0 = up to DEFAULT_NEW_TOKENS.

    Raises:
        ValueError: the text would grow longer than the context that the position map can use.
    """
    if requested < 0:
        raise ValueError(f"tokens = {requested} must be 0 (up to {DEFAULT_NEW_TOKENS}, within the usable context) or above")
    length = config.train.sequence_length
    limit = evaluated.usable_length(config.position, length)
    if limit is not None and prompt + max(requested, 1) > limit:
        raise ValueError(
            f"a prompt of {plural(prompt, 'token')} and {max(requested, 1):,} more exceed the {limit:,} that a model "
            f"trained at {length:,} can use with position '{evaluated.kind}'; ask for fewer or use position "
            f"rerope,window={max(1, length // 4)}"
        )
    if requested:
        return requested
    return DEFAULT_NEW_TOKENS if limit is None else min(DEFAULT_NEW_TOKENS, limit - prompt)


def evaluation_position(trained: Trained, asked: PositionConfig | Mapping[str, Any] | str | None) -> PositionConfig:
    """The position map to evaluate with. What `asked` leaves unset is as trained where training depends on it
    (PositionConfig.evaluation_values).

    Args:
        asked: values, `kind,name=value,...`, or nothing, which is `Trained.position`.

    Raises:
        ValueError: one sentence.
    """
    if not asked:
        return trained.position
    if isinstance(asked, str):
        values = parse_position(asked)
    else:
        values = asked.model_dump(exclude_unset=True) if isinstance(asked, PositionConfig) else asked
    try:
        position = PositionConfig.model_validate(trained.config.position.evaluation_values(translate_position(values)))
    except ValidationError as error:
        raise ValueError(f"position {asked}: {validation_sentence(error)}") from None
    check_position(trained.config, position, f"position {asked}: ")
    return position


def parse_position(text: str) -> dict[str, str]:
    """The values that `kind,name=value,...` gives.

    Raises:
        ValueError: one sentence.
    """
    kind, *settings = text.split(",")
    values = {"kind": kind.strip()}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"position {text}: '{setting}' must read name=value, as in rerope,window=512")
        values[name.strip()] = value.strip()
    return values
