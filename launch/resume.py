"""From which checkpoint a run goes on, with which values, whether it may, and what has changed since."""

import copy
import json
import shutil
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from launch.config import RunConfig, build
from launch.runtime import World
from model.config import ModelConfig
from trainer.config import CheckpointConfig, OptimizerConfig, ScheduleConfig
from trainer.life import Life, life_in
from trainer.manifest import Meta
from trainer.metrics import FILE_NAME, WANDB_FILE, bring_back
from trainer.schedule import multiplier
from trainer.store import SUPERSEDED, is_remote, numbered, replace_file

SHAPES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "tie_word_embeddings", "tied_head", "attention", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim",
    "qk_rope_head_dim", "v_head_dim", "qk_norm",
)  # fmt: skip
"""What makes another model of it."""
ORDER = (("run", "seed"), ("train", "sequence_length"), ("train", "global_batch_size"))
"""What decides, beside the corpus, which tokens batch n holds."""
LIFE_FILE = "life.json"
"""RUN/life.json: the life of the run in this directory, and the launch that it last belonged to."""
CONFIG_FILE = "config.toml"
CURVES = (FILE_NAME, "tensorboard")
RECORDS = (*CURVES, WANDB_FILE, CONFIG_FILE)
"""What a run directory tells of one life."""

TRAINING: dict[str, tuple[str, ...]] = {
    "run": ("seed",),
    "model": (),
    "position": (),
    "data": ("tokenizer", "train", "validation", "curriculum", "document_mask"),
    "optimizer": (
        "name", "learning_rate", "betas", "weight_decay", "eps", "embedding", "embedding_rms", "embedding_learning_rate",
        "rms_floor", "embedding_weight_decay", "max_grad_norm", "non_finite", "rounding",
    ),
    "schedule": (),
    "train": ("steps", "sequence_length", "global_batch_size", "precision"),
    "health": ("spike_sigmas", "spike_window_steps", "spike_action", "max_skipped_steps"),
}  # fmt: skip
"""Keys that decide what is learned, all of a section where none is named. Left unset, they are as in the checkpoint that is
resumed. All others (layout, saving, logging) are as they are asked for, or their default, at every start."""
BELONG_TO = {
    "optimizer.name": (
        "learning_rate", "betas", "weight_decay", "eps", "embedding", "embedding_rms", "rms_floor", "max_grad_norm",
        "non_finite", "rounding",
    ),
    "parallel.engine": ("max_grad_norm", "rounding"),
    "schedule.kind": ("points", "decay_steps"),
    "position.kind": ("window", "leak", "factor"),
}  # fmt: skip
"""Keys whose value says something for one choice only: with another choice they are as if the run began."""


@dataclass(frozen=True)
class Start:
    """Where a start begins."""

    life: Life
    resumes: bool
    """From the newest checkpoint of `life`; otherwise from `life.source` or from the beginning."""


def choose_start(
    settings: CheckpointConfig, here: World, recorded: dict[str, Any] | None, found: Iterable[tuple[int, Life | None]]
) -> Start:
    """Whose checkpoints a start goes on from.

    `never` and a path say how a life begins: its first start. Later starts, by torchrun, by SLURM or by the same command typed
    again, go on from the newest checkpoint of that life; so does `auto`.

    Args:
        recorded: RUN/life.json, if there is one.
        found: the checkpoints in the directory, newest first, each with its life; None for one that cannot be read.
    """
    record = life_in(recorded) if recorded else None
    again = recorded is not None and (recorded.get("launch") == here.launch if here.launch else here.restarts > 0)
    match settings.resume:
        case "never":
            if not (again and record):
                return Start(Life(_new()), False)
            return Start(record, any(life is None or life.id == record.id for _, life in found))
        case "auto":
            lives = [life for _, life in found]
            if record is None:
                record = next((life for life in lives if life is not None), None) or Life("" if lives else _new())
            return Start(record, any(life is None or life.id == record.id for life in lives))
        case path:
            source, fresh = normal(path), settings.reset_optimizer
            mine = record is not None and (record.source, record.weights_only) == (source, fresh)
            for _, life in found:
                same = life is not None and (life.source, life.weights_only) == (source, fresh)
                if life is not None and same and (record is None or not mine or life.id == record.id):
                    return Start(life, True)
            return Start(record if mine and record else Life(_new(), source, fresh), False)


def normal(path: str) -> str:
    """A checkpoint's address, the same for every way to write it."""
    return path if is_remote(path) else str(Path(path).resolve())


def _new() -> str:
    return uuid.uuid4().hex[:12]


def read_life(run_dir: str) -> dict[str, Any] | None:
    """RUN/life.json; None where there is none that can be read."""
    try:
        found = json.loads((Path(run_dir) / LIFE_FILE).read_text())
    except (OSError, ValueError):
        return None
    texts = [found.get(key, "") for key in ("id", "source", "launch")] if isinstance(found, dict) else [None]
    return found if all(isinstance(text, str) for text in texts) else None


def take_directory(run_dir: str, life: Life, here: World, before: dict[str, Any] | None, source: Meta | None) -> str:
    """Note whose directory this is from now on, and let the records in it be those of this life.

    Another life's are set aside, and its own come back. A life that begins from a checkpoint of the one before goes on with
    its records. A kill between any two lines is made up for by the next start.

    Args:
        before: RUN/life.json, of the life that was here last.
        source: of the checkpoint that is gone on from, with its optimizer.

    Returns:
        Where the records are that were there; "" if none had to go.
    """
    root, last = Path(run_dir), life_in(before or {}).id
    bring_back(root / FILE_NAME)
    origin = life_in(source.extra.get("life", {})).id if source is not None else None
    aside = _set_aside(root, last, copying=origin == last) if last != life.id else None
    replace_file(root / LIFE_FILE, json.dumps({**life.record(), "launch": here.launch}).encode() + b"\n")
    own = list(takewhile(Path.exists, _places(root, life.id)))
    history = list(takewhile(Path.exists, _places(root, origin))) if origin is not None and last != life.id else []
    for name in RECORDS:
        if (root / name).exists():
            continue
        if path := _latest(own, name):
            path.rename(root / name)
        elif name in CURVES and (path := _latest(history, name)):
            _copy(path, root / name)
    for place in own:
        if [path.name for path in place.iterdir()] == [CONFIG_FILE]:
            shutil.rmtree(place)  # the rest of it came back
    return str(aside or "")


def _places(root: Path, life: str) -> Iterator[Path]:
    """Where records of a life are set aside: RUN/superseded/LIFE, and the next names where the first has some."""
    return numbered(root / SUPERSEDED / (life or "unnamed"))


def _latest(places: list[Path], name: str) -> Path | None:
    """The one that was set aside last."""
    return next((place / name for place in reversed(places) if (place / name).exists()), None)


def _set_aside(root: Path, life: str, copying: bool) -> Path | None:
    """Where the records of a life go, so that no others are lost there; None if there are none."""
    there = [root / name for name in RECORDS if (root / name).exists()]
    if not there:
        return None
    aside = next(place for place in _places(root, life) if not any((place / path.name).exists() for path in there))
    aside.mkdir(parents=True, exist_ok=True)
    for path in there:
        if path.name == CONFIG_FILE or (copying and path.name in CURVES):  # the first may be what this start was given
            _copy(path, aside / path.name)
        else:
            path.rename(aside / path.name)
    return aside


def _copy(path: Path, to: Path) -> None:
    """Whole or not at all."""
    beside = to.with_name(f".{to.name}.new")
    if path.is_dir():
        shutil.rmtree(beside, ignore_errors=True)  # what a kill left
        shutil.copytree(path, beside)
        beside.rename(to)
    else:
        replace_file(to, path.read_bytes())


def settle(asked: RunConfig, meta: Meta) -> RunConfig:
    """The configuration that acts: training keys that were left unset are those of the checkpoint that is resumed.

    Raises:
        ValueError: they do not go with what was asked for.
    """
    given = asked.model_dump(mode="json", exclude_unset=True)
    values, before = copy.deepcopy(given), filled(meta.config)
    left_out = {
        f"{'optimizer' if choice == 'parallel.engine' else choice.partition('.')[0]}.{key}"
        for choice, keys in BELONG_TO.items()
        if _at(filled(asked.model_dump(mode="json")), choice) != _at(before, choice)
        and (choice == "parallel.engine" or _is_set(given, choice))
        for key in keys
    }
    for section, keys in TRAINING.items():
        theirs = before.get(section, {})
        for key in keys or theirs:
            if key in theirs and not _is_set(given, f"{section}.{key}") and f"{section}.{key}" not in left_out:
                values.setdefault(section, {})[key] = theirs[key]
    return build(values, where="the configuration, with the checkpoint's values for what it leaves unset,")


def inherited(asked: RunConfig, acting: RunConfig, path: str) -> list[str]:
    """One line for every value that comes from the checkpoint and is not the default."""
    default = filled(asked.model_dump(mode="json"))
    return [
        f"as in {path}: {section}.{key} = {value} (left unset; the default is {default[section][key]})"
        for section, values in taken_over(asked, acting).items()
        for key, value in values.items()
    ]


def taken_over(asked: RunConfig, acting: RunConfig) -> dict[str, dict[str, Any]]:
    """Training keys by section that were left unset and act with another value than their default: an earlier start's."""
    given = asked.model_dump(mode="json", exclude_unset=True)
    default, now = filled(asked.model_dump(mode="json")), filled(acting.model_dump(mode="json"))
    found: dict[str, dict[str, Any]] = {}
    for section, keys in TRAINING.items():
        for key in keys or now[section]:
            value = now[section][key]
            if value is not None and value != default[section][key] and not _is_set(given, f"{section}.{key}"):
                found.setdefault(section, {})[key] = value
    return found


def filled(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration in plain values, with the optimizer's defaults as numbers: those of a later version may be others."""
    try:
        optimizer = OptimizerConfig.model_validate(config["optimizer"])
    except (KeyError, ValidationError):  # of another version
        return config
    own = {
        "learning_rate": optimizer.rate, "betas": list(optimizer.coefficients), "weight_decay": optimizer.decay,
    }  # fmt: skip
    return {**config, "optimizer": {**config["optimizer"], **own}}


def _at(config: dict[str, Any], key: str) -> Any:
    section, _, name = key.partition(".")
    return config.get(section, {}).get(name)


def _is_set(given: dict[str, Any], key: str) -> bool:
    section, _, name = key.partition(".")
    return name in given.get(section, {})


def refuse_foreign(path: str, meta: Meta, config: RunConfig, corpus: str | None) -> None:
    """Refuse a checkpoint of another model, or one that would go on with other data.

    Args:
        corpus: fingerprint of the training stream; None where the data start anew.

    Raises:
        ValueError: one sentence.
    """
    now = config.model_dump(mode="json")
    theirs, ours = _filled(meta.config.get("model", {})), _filled(now["model"])
    for key in SHAPES:
        if key in theirs and theirs[key] != ours[key]:
            raise ValueError(
                f"checkpoint {path} is of another model: its model.{key} is {theirs[key]}, this run's {ours[key]}; "
                "use its configuration, another run.dir, or checkpoint.resume=never"
            )
    if corpus is None:
        return
    for section, key in ORDER:
        before = meta.config.get(section, {}).get(key)
        if before is not None and before != now[section][key]:
            raise ValueError(_refusal(path, f"{section}.{key} was {before} and is {now[section][key]}"))
    before = meta.fingerprints.get("corpus")
    if before is not None and before != corpus:
        raise ValueError(_refusal(path, f"the corpus was {before} and is {corpus}"))


def _filled(model: dict[str, Any]) -> dict[str, Any]:
    """[model] with its defaults filled in, and without what has no meaning in it."""
    try:
        config = ModelConfig.model_validate(model)
    except ValidationError:  # of another version
        return model
    grouped = {"num_key_value_heads": config.kv_heads, "head_dim": config.head_size} if config.attention == "gqa" else {}
    return {**model, **grouped, "tied_head": config.tied_head if config.tie_word_embeddings else None}


def _refusal(path: str, what: str) -> str:
    return (
        f"going on from {path} would change the order of the data: {what}; restore it, or start a new run from its weights "
        f"with run.dir=NEW checkpoint.resume={path} checkpoint.reset_optimizer=true"
    )


def rate_remark(meta: Meta, config: RunConfig) -> str:
    """One sentence where resuming raises the schedule's multiplier above that of the last update; else "".

    A rise that the checkpoint's own configuration continues (a warm-up) is none of it.
    """
    try:
        old = ScheduleConfig.model_validate(meta.config["schedule"])
        old_steps = int(meta.config["train"]["steps"])
    except (KeyError, TypeError, ValidationError):
        return ""  # an imported model has none
    if not meta.step:
        return ""
    last, expected = (multiplier(old, step, old_steps) for step in (meta.step - 1, meta.step))
    now = multiplier(config.schedule, meta.step, config.train.steps)
    if now <= max(last, expected):
        return ""
    return (
        f"the learning rate rises again: the schedule's multiplier was {last:.4g} at update {meta.step} and is {now:.4g} at "
        f"update {meta.step + 1}, because train.steps or [schedule] changed; to go on at the low rate, continue with "
        f"schedule.kind=piecewise schedule.points=[[0,{last:.4g}]]"
    )


def differences(asked: RunConfig, acting: RunConfig, meta: Meta, path: str, weights_only: bool) -> list[str]:
    """What is said of a checkpoint that a run goes on from: one line for each value that differs or was taken over."""
    before, now = filled(meta.config), filled(acting.model_dump(mode="json"))
    lines = [f"changed since {path}: {line}" for line in changes(before, now)]
    if not weights_only:
        lines += inherited(asked, acting, path)
        if remark := rate_remark(meta, acting):
            lines.append(remark)
    return lines


def changes(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """`section.key: old -> new` for every value that differs, in the order of the new configuration."""
    found: list[str] = []
    for key in [*now, *(key for key in before if key not in now)]:
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found.extend(changes(old, new, f"{prefix}{key}."))
        elif old != new and f"{prefix}{key}" not in ("run.dir", "checkpoint.resume"):
            found.append(f"{prefix}{key}: {old} -> {new}")
    return found
