"""The configuration of a run: a TOML file, then `section.key=value` from the command line, checked as a whole.

Nothing here touches hardware or starts a process.
"""

import copy
import difflib
import json
import math
import tomllib
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from data.config import DataConfig
from data.corpus.batches import BatchSizes
from data.corpus.validation import check_contexts
from launch.shipped import SHIPPED, is_shipped, shipped_names
from launch.versions import translate
from model.config import ModelConfig
from model.parameters import ParameterSpec
from model.positions.config import PositionConfig
from model.sizes import check_split, parameter_specs
from trainer.config import (
    CheckpointConfig,
    EvaluateConfig,
    HealthConfig,
    HomePath,
    ParallelConfig,
    ProfileConfig,
    ScheduleConfig,
    TrainConfig,
)
from trainer.monitoring.config import LogConfig
from trainer.monitoring.progress import plural
from trainer.optimizers.check import check_optimizer
from trainer.optimizers.config import OptimizerConfig
from trainer.state import State

BEGINNING = State()
RESOLVED = "resolved"
"""Table of RUN/config.toml with every value that acted; it is skipped when the file is read as a configuration."""


class RunSection(BaseModel):
    """The run itself."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    dir: HomePath = Field(
        default="runs/default", min_length=1, description="Run directory: config, metrics, checkpoints, logs, report."
    )
    seed: int = Field(default=0, ge=0, description="Seed of the initial weights and of the data order.")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto = cuda where there is one.")
    deterministic: bool = Field(
        default=False,
        description="The same bits from every repetition and resume on a GPU too, by slower kernels; on a CPU they are anyway.",
    )


class RunConfig(BaseModel):
    """Everything that decides a run."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    run: RunSection = Field(default=RunSection(), description="Directory, seed, device.")
    model: ModelConfig = Field(default=ModelConfig(), description="The network.")
    position: PositionConfig = Field(default=PositionConfig(), description="The position map.")
    data: DataConfig = Field(default=DataConfig(), description="The corpus.")
    optimizer: OptimizerConfig = Field(default=OptimizerConfig(), description="The update rule.")
    schedule: ScheduleConfig = Field(default=ScheduleConfig(), description="The learning rate over time.")
    train: TrainConfig = Field(default=TrainConfig(), description="Steps, batches, precision.")
    parallel: ParallelConfig = Field(default=ParallelConfig(), description="How ranks share the work.")
    checkpoint: CheckpointConfig = Field(default=CheckpointConfig(), description="Saving and resuming.")
    evaluate: EvaluateConfig = Field(default=EvaluateConfig(), description="Held-out loss.")
    log: LogConfig = Field(default=LogConfig(), description="Records and samples.")
    health: HealthConfig = Field(default=HealthConfig(), description="What counts as unhealthy.")
    profile: ProfileConfig = Field(default=ProfileConfig(), description="Traces.")

    _renamed: tuple[str, ...] = PrivateAttr(())

    @property
    def renamed(self) -> tuple[str, ...]:
        """One sentence for each key that was given by the name of an earlier version (launch/versions.py)."""
        return self._renamed

    @model_validator(mode="before")
    @classmethod
    def _fill_evaluation_position(cls, values: Any) -> Any:
        match values:
            case {"evaluate": {"position": dict(given), **others}}:
                with suppress(ValidationError):  # a mistake in [position] is reported when that section is validated
                    trained = PositionConfig.model_validate(values.get("position", {}))
                    return {**values, "evaluate": {**others, "position": trained.evaluation_values(given)}}
        return values


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read a TOML file, apply `section.key=value` overrides, check it.

    Args:
        path: of the file, or the name of a shipped one, such as quickstart.

    Raises:
        ValueError, FileNotFoundError: one sentence for the first mistake.
    """
    file = SHIPPED / f"{path}.toml" if is_shipped(path) else Path(path)
    if not file.is_file():
        fault, names = "is a directory" if file.is_dir() else "does not exist", ", ".join(shipped_names())
        raise FileNotFoundError(f"configuration {path} {fault}; give the path of a TOML file, or a shipped one's name: {names}")
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8-sig"))
        values.pop(RESOLVED, None)
    except OSError as error:
        raise ValueError(f"configuration {path} cannot be read ({error.strerror}); give the path of a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None
    return build_config(values, overrides, str(path))


def build_config(
    values: dict[str, Any], overrides: list[str] | tuple[str, ...] = (), where: str = "the configuration"
) -> RunConfig:
    """A checked configuration from plain values and overrides."""
    values = copy.deepcopy(values)
    assignments = [_assignment(override) for override in overrides]
    for path, value in assignments:
        _set(values, path, value)
    renamed = translate(values, [path for path, _ in assignments])
    _refuse_booleans(values, RunConfig)
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{where}: {validation_sentence(error)}") from None
    check_config(config)
    config._renamed = tuple(renamed)
    return config


def _refuse_booleans(values: dict[str, Any], model: type[BaseModel], prefix: str = "") -> None:
    """Refuse true and false where a number is wanted: pydantic would take them for 1 and 0."""
    for key, value in values.items():
        field = model.model_fields.get(key)
        if field is None:
            continue
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        if isinstance(value, dict) and (table := _table_model(field.annotation)):
            _refuse_booleans(value, table, f"{prefix}{key}.")
        elif isinstance(value, bool) and bool not in kinds:
            raise ValueError(f"{prefix}{key} = {str(value).lower()}: it takes no truth value (docs/configuration.md)")


def _assignment(override: str) -> tuple[tuple[str, ...], Any]:
    """Key and value of an override."""
    key, equals, text = override.partition("=")
    path = _key_path(key)
    if not equals or len(path) < 2:
        raise ValueError(f"override '{override}' must read section.key=value, for example train.steps=100")
    try:
        return path, tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return path, text.strip()


def _set(values: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for part in path[:-1]:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise ValueError(f"override of {'.'.join(path)}: {part} is a value, not a section")
    values[path[-1]] = value


def _key_path(key: str) -> tuple[str, ...]:
    """The parts of a dotted key, of which one with dots of its own is quoted, as in TOML."""
    try:
        table: Any = tomllib.loads(f"{key} = 0")
    except tomllib.TOMLDecodeError:
        return tuple(key.strip().split("."))
    path = []
    while isinstance(table, dict) and table:
        (name, table), *_ = table.items()
        path.append(name)
    return tuple(path)


def validation_sentence(error: ValidationError) -> str:
    """The first mistake as one sentence, with the nearest right key for a wrong one."""
    errors = error.errors()
    # a key that takes a string or a list has an error for each: the one that matched further is what was meant; and a key that
    # is missing may be there under a wrong name
    near = (other for other in errors if other["loc"][:2] == errors[0]["loc"][:2])
    first = max(near, key=lambda other: (len(other["loc"]), other["type"] == "extra_forbidden"))
    path = [str(part) for part in first["loc"] if part != "str" and not str(part).startswith("list[")]
    key = ".".join(path)
    match first["type"]:
        case "extra_forbidden":
            legal = _fields(path[:-1])
            near = difflib.get_close_matches(path[-1], legal, 1, 0.5) or _in_another_section(path[-1])
            hint = f"did you mean {near[0]}?" if near else f"legal here: {', '.join(legal)}"
            return f"unknown key {key}; {hint}"
        case "value_error":
            message = first.get("ctx", {}).get("error", first["msg"])
            return f"[{key}] {message}" if key else str(message)
        case "missing":
            return f"{key} is missing; set it"
        case "tuple_type" | "list_type":
            return f"{key} = {first['input']!r}: it takes a list"
        case "model_type" | "dict_type":
            return f"{key} = {first['input']!r}: it takes a table, as {{name = value}}"
        case _:
            return f"{key} = {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"


def _fields(path: list[str]) -> list[str]:
    """The keys of a section, or of a table in it; none for what is no table."""
    model: Any = RunConfig
    for part in path:
        if part.isdigit():  # one of a list of tables
            continue
        field = getattr(model, "model_fields", {}).get(part)
        if field is None:
            return []
        model = _table_model(field.annotation)
    return list(getattr(model, "model_fields", {}))


def _table_model(annotation: Any) -> type[BaseModel] | None:
    """The model of a key that takes a table, or a list of tables; None for other keys."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((table for inner in get_args(annotation) if (table := _table_model(inner))), None)


def _in_another_section(name: str) -> list[str]:
    keys: dict[str, str] = {}
    for section in RunConfig.model_fields:
        for key in _fields([section]):
            keys.setdefault(key, f"{section}.{key}")
            for inner in _fields([section, key]):
                keys.setdefault(inner, f"{section}.{key}.{inner}")
    return [keys[near] for near in difflib.get_close_matches(name, list(keys), 1, 0.7)]


def check_config(config: RunConfig) -> None:
    """What no section can check alone. Whether the sizes of a ramp divide, `micro_batches` checks: some may be of the past.

    Raises:
        ValueError: one sentence.
    """
    check_split(config.model, config.parallel.tensor_parallel_size)
    train = config.train
    given = "global_batch_size" in train.model_fields_set  # left unset it may be a checkpoint's
    if given and train.global_batch_size % train.micro_batch_size:
        raise ValueError(
            f"train.global_batch_size = {train.global_batch_size} is not divisible by "
            f"train.micro_batch_size = {train.micro_batch_size}; change one of them"
        )
    size, micro_batch_tokens = config.parallel.tensor_parallel_size, train.micro_batch_size * train.sequence_length
    if config.parallel.sequence_parallel and micro_batch_tokens % size:
        raise ValueError(
            f"sequence_parallel splits micro_batch_size * sequence_length = "
            f"{plural(micro_batch_tokens, 'token')} over {plural(size, 'rank')}, which does not divide"
        )
    for name, position in (("position", config.position), ("evaluate.position", config.evaluate.position)):
        if position is not None:
            check_position(config, position, f"{name}.")
    check_contexts(config.evaluate.contexts, "evaluate.contexts")
    _check_checkpoints(config.checkpoint)
    if not may_select(config) and train.recompute == "selective":
        raise ValueError(
            "train.recompute = 'selective' cannot be used with train.compile = true and parallel.zero_stage = 3: gathering "
            "weights cuts compiled blocks in pieces whose products cannot be kept; use train.recompute=full, or compile=false"
        )
    if train.cuda_graphs:
        _check_cuda_graphs(config)
    check_optimizer(*optimized(config), config.parallel.engine)
    _check_qk_clip(config)


def check_position(config: RunConfig, position: PositionConfig, prefix: str) -> None:
    """Refuse a position map that means nothing for the network.

    Args:
        position: the map of training or of evaluation.
        prefix: of its keys in a sentence, such as "position.".

    Raises:
        ValueError: one sentence.
    """
    model = config.model
    if position.log_n != "none" and (position.trained_length or config.train.sequence_length) == 1:
        raise ValueError(
            f"{prefix}log_n = '{position.log_n}' divides by the logarithm of the trained length, which is 0 for "
            "train.sequence_length = 1; use 2 or more, or log_n=none"
        )
    acts = any(model.rotated_layer(layer) and not model.full_layer(layer) for layer in range(model.num_hidden_layers))
    if position.windowed_rope_theta is not None and not acts:
        raise ValueError(
            f"{prefix}windowed_rope_theta = {position.windowed_rope_theta} has no layer to act in: no layer is windowed and "
            "has positions; remove it or set model.sliding_window"
        )


def optimized(config: RunConfig) -> tuple[OptimizerConfig, list[tuple[str, str]], bool]:
    """The optimizer, name and kind of every parameter that it moves, and whether the embedding is the head's weight too."""
    parameters = [(name, spec.kind) for name, spec in parameter_specs(config.model).items()]
    return config.optimizer, parameters, config.model.tie_word_embeddings


def _check_checkpoints(settings: CheckpointConfig) -> None:
    """Refuse settings that would not do what they say."""
    if settings.reset_optimizer and settings.resume in ("auto", "never"):
        raise ValueError(
            f"checkpoint.reset_optimizer = true takes the weights of another run and checkpoint.resume = '{settings.resume}' "
            "names none; give its checkpoint, checkpoint.resume=PATH, or leave reset_optimizer out"
        )
    every, milestones = settings.every_steps, settings.keep_every_steps
    if milestones and (not every or milestones % every):
        raise ValueError(
            f"checkpoint.keep_every_steps = {milestones} keeps checkpoints that checkpoint.every_steps = {every} never makes; "
            "use a multiple of it"
        )


def may_select(config: RunConfig) -> bool:
    """Whether blocks can be recomputed selectively."""
    return not (config.train.compile and config.parallel.engine == "zero" and config.parallel.zero_stage == 3)


def _check_cuda_graphs(config: RunConfig) -> None:
    """Refuse what would read the memory of a CUDA graph too late, or record again and again (docs/speed.md)."""
    for wrong, sentence in (*_cuda_graph_training_limits(config), *_cuda_graph_parallel_limits(config)):
        if wrong:
            raise ValueError(f"train.cuda_graphs = true cannot be used with {sentence}")


def _cuda_graph_training_limits(config: RunConfig) -> list[tuple[bool, str]]:
    """Whether each limit of [train] and [data] is broken, and what it is."""
    train = config.train
    return [
        (not train.compile, "train.compile = false: it replays compiled blocks; use train.compile=true"),
        (
            config.parallel.engine == "zero" and train.precision == "fp32",
            "train.precision = 'fp32' and parallel.engine = 'zero': float32 gradients may stay in memory that the next replay "
            "overwrites; use train.precision=bf16 or parallel.engine=fold",
        ),
        (
            train.recompute != "none",
            f"train.recompute = '{train.recompute}': a recomputed block frees tensors in another order than was recorded; "
            "use train.recompute=none",
        ),
        (
            config.optimizer.qk_clip is not None,
            f"optimizer.qk_clip = {config.optimizer.qk_clip}: largest logits that a replay records were never tried; "
            "use train.cuda_graphs=false",
        ),
        (
            config.data.document_mask,
            "data.document_mask = true: each number of documents would be a recording of its own; use data.document_mask=false",
        ),
    ]


def _cuda_graph_parallel_limits(config: RunConfig) -> list[tuple[bool, str]]:
    """Whether each limit of [parallel] is broken, and what it is."""
    parallel, zero = config.parallel, config.parallel.engine == "zero"
    size, (name, matrix) = parallel.tensor_parallel_size, _largest_matrix(config.model)
    return [
        (
            size > 1,
            f"parallel.tensor_parallel_size = {size}: collectives inside a recording were never tried; "
            "use parallel.tensor_parallel_size=1",
        ),
        (
            zero and parallel.zero_stage == 3,
            "parallel.zero_stage = 3: a replay needs weights that stay where they are; use parallel.zero_stage=1 or 2",
        ),
        (
            parallel.offload != "none",
            f"parallel.offload = '{parallel.offload}': gradients leave for the CPU while the next replay overwrites them; "
            "use parallel.offload=none",
        ),
        (
            zero and matrix.elements > parallel.reduce_bucket_elements,
            f"parallel.reduce_bucket_elements = {parallel.reduce_bucket_elements}: gradients of more elements, such as the "
            f"{matrix.elements} of {name}, are sent while the next replay overwrites them; "
            f"use parallel.reduce_bucket_elements={matrix.elements} or more",
        ),
    ]


def _largest_matrix(model: ModelConfig) -> tuple[str, ParameterSpec]:
    """The largest of a block, whose gradients lie in the memory of its CUDA graph; those of embedding and head do not."""
    specs = parameter_specs(model).items()
    return max(((name, spec) for name, spec in specs if spec.part in ("attention", "mlp")), key=lambda item: item[1].elements)


def _check_qk_clip(config: RunConfig) -> None:
    """Refuse a limit of logits that do not follow the weights, or follow some that no loss holds."""
    limit, model = config.optimizer.qk_clip, config.model
    if limit is None:
        return
    if model.qk_norm != "none":
        raise ValueError(
            f"optimizer.qk_clip = {limit:g} cannot be used with model.qk_norm = '{model.qk_norm}': it makes weights smaller, "
            "and logits of normed queries or keys do not follow them; leave one of them out"
        )
    rotated = [config.position.kind != "none" and model.rotated_layer(layer) for layer in range(model.num_hidden_layers)]
    if model.attention_bias != "none" and not all(rotated):
        raise ValueError(
            f"optimizer.qk_clip = {limit:g} cannot be used with model.attention_bias = '{model.attention_bias}' where layer "
            f"{rotated.index(False)} has no positions: a key's bias adds the same to all logits of a query there, so that no "
            "loss holds it, it drifts, and heads would be clipped for it; leave one of them out"
        )


def batch_sizes(train: TrainConfig) -> BatchSizes:
    """Sequences of every batch."""
    return BatchSizes(train.global_batch_size, tuple(train.batch_ramp))


def total_batches(train: TrainConfig, begun: State = BEGINNING) -> int:
    """Batches that the whole run reads, with those that rewinds left behind, if none is left behind from here on.

    Args:
        begun: what the run has reached, as in the next two functions.
    """
    return begun.batch + max(0, train.steps - begun.step)


def total_tokens(train: TrainConfig, begun: State = BEGINNING) -> int:
    """Target tokens that the whole run trains on, without those of batches that rewinds left behind."""
    sizes = batch_sizes(train)
    left = sizes.before(total_batches(train, begun)) - sizes.before(begun.batch)
    return begun.tokens + left * train.sequence_length


def ahead(config: RunConfig, begun: State = BEGINNING) -> RunConfig:
    """The configuration with the updates that remain, and the sizes of their batches, which are counted from 0.

    For what has to do with the batches to come alone: how they divide over the ranks, and what they cost.
    """
    train, ramp = config.train, batch_sizes(config.train).from_batch(begun.batch).ramp
    left = {"steps": max(0, train.steps - begun.step), "batch_ramp": [*ramp]}
    return config.model_copy(update={"train": train.model_copy(update=left)})


def micro_batches(config: RunConfig, world_size: int) -> int:
    """Micro-batches per update on each rank, of the largest updates. Of a run that resumes, hand in what is `ahead`.

    Raises:
        ValueError: the world fits no layout.
    """
    train, size = config.train, config.parallel.tensor_parallel_size
    if world_size < 1:
        raise ValueError(f"a run has at least 1 rank, got {world_size}; give --nproc 1 or more")
    if world_size % size:
        raise ValueError(
            f"{plural(world_size, 'rank')} cannot form groups of parallel.tensor_parallel_size = {size}; start a multiple of it"
        )
    ranks = world_size // size
    together = train.micro_batch_size * ranks
    for size in train.batch_sizes:
        if size % together:
            last = size == train.global_batch_size
            key = f"train.global_batch_size = {size}" if last else f"train.batch_ramp has {plural(size, 'sequence')}, which"
            raise ValueError(
                f"{key} is not a multiple of train.micro_batch_size = {train.micro_batch_size} times "
                f"{plural(ranks, 'data-parallel rank')}; change one of them"
            )
    return max(train.batch_sizes) // together


def dump(config: RunConfig) -> str:
    """The configuration as TOML that `load_config` reads back to the same values (keys that are None are left out)."""
    return as_toml(config.model_dump(mode="json", exclude_none=True))


def as_toml(values: dict[str, Any]) -> str:
    """Nested plain values as TOML, each table below its own heading."""
    lines: list[str] = []
    _table(values, "", lines)
    return "\n".join(lines) + "\n"


def _table(values: dict[str, Any], name: str, lines: list[str]) -> None:
    plain = {key: value for key, value in values.items() if not isinstance(value, dict)}
    if name and plain:
        lines.append(f"{'' if not lines else chr(10)}[{name}]")
    lines.extend(f"{_toml_key(key)} = {_toml(value)}" for key, value in plain.items())
    for key, value in values.items():
        if isinstance(value, dict):
            _table(value, f"{name}.{_toml_key(key)}" if name else _toml_key(key), lines)


def _toml_key(key: str) -> str:
    """A key, quoted where it is more than a word."""
    return key if key.replace("_", "").replace("-", "").isalnum() else json.dumps(key)


def _toml(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case float():
            return repr(value) if math.isfinite(value) else str(value)
        case list():
            return "[" + ", ".join(_toml(item) for item in value) + "]"
        case dict():
            return "{" + ", ".join(f"{_toml_key(key)} = {_toml(item)}" for key, item in value.items()) + "}"
        case str():
            return json.dumps(value)
        case _:
            return repr(value)
