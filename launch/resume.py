"""Resuming: the values that a checkpoint decides, whether it may be resumed, what has changed, and whose run directory it is.

Which checkpoint that is, launch/resume_source.py says.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from data.corpus.batches import BatchSizes
from data.corpus.plan import FINGERPRINT_DIGITS, read_plan
from data.corpus.stream import Stream
from data.storage import replace_file
from data.storage.disk import SUPERSEDED, numbered_paths
from launch.acting_values import acting_values, changed_values, shown_value
from launch.batches import batch_sizes
from launch.config import RunConfig
from launch.load_config import build_config
from launch.runtime import World
from model.config import ModelConfig
from model.positions.config import OWN_KEYS
from model.sizes import parameter_specs
from trainer.checkpoint.lineage import Lineage, lineage_from, lineage_of
from trainer.checkpoint.manifest import CheckpointMeta
from trainer.config import ScheduleConfig, TrainConfig
from trainer.monitoring.config import TRACKERS
from trainer.monitoring.jsonl import rescue_records
from trainer.monitoring.progress import left_behind
from trainer.monitoring.records import FILE_NAME
from trainer.optimizers.config import rule_names
from trainer.schedule import multiplier
from trainer.state import State

DATA_ORDER = (("run", "seed"), ("train", "sequence_length"), ("train", "global_batch_size"))
"""What decides, beside the corpus, which tokens batch n holds."""
BATCH_RAMP = "train.batch_ramp"
LINEAGE_FILE = "lineage.json"
"""RUN/lineage.json: the lineage of the run in this directory, and the launch that it last belonged to."""
LINEAGE_FILES = (LINEAGE_FILE, "life.json")
"""Its present name, and that of 0.1.0."""
CONFIG_FILE = "config.toml"
CURVES = (FILE_NAME, "tensorboard")
RECORDS = (*CURVES, *(tracker.run_file for tracker in TRACKERS.values()), CONFIG_FILE)
"""Files of a run directory that belong to one lineage."""

TRAINING: dict[str, tuple[str, ...]] = {
    "run": ("seed",),
    "model": (),
    "position": (),
    "data": ("tokenizer", "train", "validation", "curriculum", "document_mask", "pack"),
    "optimizer": ("name", "max_grad_norm", "rounding", "rules", *rule_names()),
    "schedule": (),
    "train": ("steps", "sequence_length", "global_batch_size", "batch_ramp", "length_ramp", "precision"),
    "health": ("spike_sigmas", "spike_window_steps", "spike_action", "max_skipped_steps"),
}  # fmt: skip
"""Keys that decide what is learned, all of a section where none is named. Left unset, they are as in the checkpoint that is
resumed. All others (layout, saving, logging) are as they are asked for, or their default, at every start."""
BELONG_TO = {
    "parallel.engine": ("max_grad_norm", "rounding"),
    "schedule.kind": ("points", "decay_steps"),
    "position.kind": OWN_KEYS,
}  # fmt: skip
"""Keys whose value is meant for one choice only: with another choice they have their defaults."""


def read_lineage(run_dir: str) -> dict[str, Any] | None:
    """RUN/lineage.json; None where there is none that can be read."""
    try:
        record = json.loads(next(path for name in LINEAGE_FILES if (path := Path(run_dir) / name).exists()).read_text())
        lineage_from(record)
    except (OSError, ValueError, RecursionError, StopIteration):
        return None
    return record if isinstance(record.get("launch", ""), str) else None


def take_directory(
    run_dir: str, lineage: Lineage, world: World, before: dict[str, Any] | None, source: CheckpointMeta | None
) -> str:
    """Record whose directory this is from now on, and make the records in it those of this lineage.

    Another lineage's are moved to RUN/superseded, and this one's come back from there. A lineage that starts from a checkpoint
    of the one before continues its records. A kill between any two lines is made up for by the next start.

    Args:
        before: RUN/lineage.json, of the lineage that was here last.
        source: of the checkpoint that is resumed with its optimizer.

    Returns:
        Where the earlier records are now; "" if none had to go.
    """
    root, last_id = Path(run_dir), lineage_from(before or {}).id
    rescue_records(root / FILE_NAME, replace_file)
    source_id = lineage_of(source.extra).id if source is not None else None
    changes = last_id != lineage.id
    superseded = _supersede(root, last_id, copying=source_id == last_id) if changes else None
    replace_file(root / LINEAGE_FILE, json.dumps({**lineage.record(), "launch": world.launch}).encode() + b"\n")
    (root / LINEAGE_FILES[-1]).unlink(missing_ok=True)
    own = list(takewhile(Path.exists, _superseded_directories(root, lineage.id)))
    history = []
    if changes and source_id is not None:
        history = list(takewhile(Path.exists, _superseded_directories(root, source_id)))
    for name in RECORDS:
        if (root / name).exists():
            continue
        if path := _latest(own, name):
            path.rename(root / name)
        elif name in CURVES and (path := _latest(history, name)):
            _copy(path, root / name)
    for directory in own:
        if [path.name for path in directory.iterdir()] == [CONFIG_FILE]:
            shutil.rmtree(directory)  # the rest of it came back
    return str(superseded or "")


def _superseded_directories(root: Path, lineage_id: str) -> Iterator[Path]:
    """RUN/superseded/LINEAGE, and the next names where that one is taken."""
    return numbered_paths(root / SUPERSEDED / (lineage_id or "unnamed"))


def _latest(directories: list[Path], name: str) -> Path | None:
    """The record that was superseded last."""
    return next((directory / name for directory in reversed(directories) if (directory / name).exists()), None)


def _supersede(root: Path, lineage_id: str, copying: bool) -> Path | None:
    """Move the records of a lineage to a directory that lacks them, the curves copied if `copying`; None if there are none."""
    records = [root / name for name in RECORDS if (root / name).exists()]
    if not records:
        return None
    free = (
        directory
        for directory in _superseded_directories(root, lineage_id)
        if not any((directory / path.name).exists() for path in records)
    )
    superseded = next(free)
    superseded.mkdir(parents=True, exist_ok=True)
    for path in records:
        if path.name == CONFIG_FILE or (copying and path.name in CURVES):  # config.toml may be what this start was given
            _copy(path, superseded / path.name)
        else:
            path.rename(superseded / path.name)
    return superseded


def _copy(path: Path, to: Path) -> None:
    """Copy completely or not at all."""
    partial = to.with_name(f".{to.name}.new")
    if path.is_dir():
        shutil.rmtree(partial, ignore_errors=True)  # what a kill left
        shutil.copytree(path, partial)
        partial.rename(to)
    else:
        replace_file(to, path.read_bytes())


def next_batch(meta: CheckpointMeta) -> int:
    """Number of the global batch that a run reads next when it resumes from a checkpoint."""
    batch = meta.extra.get("batch", meta.step)
    return batch if type(batch) is int and batch >= 0 else meta.step


def reached(meta: CheckpointMeta | None, weights_only: bool = False) -> State:
    """What a run has reached that resumes from a checkpoint: nothing where there is none, or its weights alone are taken."""
    return State() if meta is None or weights_only else State(meta.step, meta.tokens, next_batch(meta))


def settle(asked: RunConfig, meta: CheckpointMeta) -> RunConfig:
    """The configuration that acts: training keys that were left unset are those of the checkpoint that is resumed.

    Raises:
        ValueError: they contradict what was asked for.
    """
    given, default = _keys(asked.model_dump(mode="json", exclude_unset=True)), _keys(asked.model_dump(mode="json"))
    before = _keys(meta.config)
    left_out = {
        f"{'optimizer' if choice == 'parallel.engine' else choice.partition('.')[0]}.{key}"
        for choice, keys in BELONG_TO.items()
        if default.get(choice) != before.get(choice) and (choice == "parallel.engine" or choice in given)
        for key in keys
    }
    theirs = {key: value for key, value in before.items() if _is_training(key) and key not in left_out}
    values = _tables(theirs | given)
    acting = build_config(values, where="the configuration, with the checkpoint's values for what it leaves unset,")
    return _with_batches_done(acting, BATCH_RAMP in given, meta)


def _with_batches_done(acting: RunConfig, ramp_given: bool, meta: CheckpointMeta) -> RunConfig:
    """With the sizes that the batches up to the checkpoint had, whatever they are from it on.

    A ramp that was given says what comes, in the middle of it too, and is left as it is where it contradicts what was done:
    `other_past` then refuses it. Without one, another size ends the ramp of the checkpoint.
    """
    before, batch, now = _trained_sizes(meta), next_batch(meta), batch_sizes(acting.train)
    if before is None or (ramp_given and now.ramp_contradicts(before, batch)):
        return acting
    if not ramp_given and now.last != before.last:
        now = BatchSizes(now.last)
    ramp = before.continued(batch, now).ramp
    if ramp == tuple(acting.train.batch_ramp):
        return acting
    values = acting.model_dump(mode="json", exclude_unset=True)
    values["train"] = {**values.get("train", {}), "batch_ramp": [*map(list, ramp)]}
    return build_config(values)


def _trained_sizes(meta: CheckpointMeta) -> BatchSizes | None:
    """The batch sizes of the run of a checkpoint; None for an imported model, which has none."""
    try:
        return batch_sizes(TrainConfig.model_validate(meta.config["train"]))
    except (KeyError, TypeError, ValidationError):
        return None


def ended_ramp(asked: RunConfig, acting: RunConfig, meta: CheckpointMeta) -> str:
    """One sentence where another batch size ends a ramp of the checkpoint's that nobody named; else ""."""
    before, batch = _trained_sizes(meta), next_batch(meta)
    if before is None or "batch_ramp" in asked.train.model_fields_set or acting.train.global_batch_size == before.last:
        return ""
    coming = BatchSizes(before.last, tuple(piece for piece in before.ramp if piece[0] > batch))
    if not coming.ramp:
        return ""
    return (
        f"train.global_batch_size = {acting.train.global_batch_size:,} holds from batch {batch:,} on and ends the ramp of the "
        f"checkpoint ({coming.words()}); to keep a ramp, give train.batch_ramp too"
    )


def extended_ramp(asked: RunConfig, acting: RunConfig, meta: CheckpointMeta) -> str:
    """One sentence where a ramp was given, and what was trained after its end is added to it; else ""."""
    given, acts = ([*map(list, config.train.batch_ramp)] for config in (asked, acting))
    if "batch_ramp" not in asked.train.model_fields_set or given == acts:
        return ""
    return f"train.batch_ramp acts as {acts}: the batches before batch {next_batch(meta):,} are those that were trained"


def inherited(asked: RunConfig, acting: RunConfig, meta: CheckpointMeta, path: str) -> list[str]:
    """One line for every value that comes from the checkpoint and acts otherwise than its default."""
    default, acts, theirs = _keys(acting_values(asked)), _keys(acting_values(acting)), _keys(meta.config)
    return [
        f"as in {path}: {key} = {shown_value(value)} (left unset; the default is {shown_value(default.get(key))})"
        for key, value in _taken_over(asked, acting).items()
        if default.get(key) != acts.get(key) and theirs.get(key, value) == value
    ]


def asked_for(asked: RunConfig, acting: RunConfig) -> dict[str, Any]:
    """What this start or an earlier one of the run asked for, by section; and how large the batches of the past were."""
    keys = _keys(asked.model_dump(mode="json", exclude_unset=True)) | _taken_over(asked, acting)
    if acting.train.batch_ramp != asked.train.batch_ramp:
        keys[BATCH_RAMP] = acting.model_dump(mode="json")["train"]["batch_ramp"]
    return _tables(keys)


def _taken_over(asked: RunConfig, acting: RunConfig) -> dict[str, Any]:
    """Training keys that were left unset and act with another value than their default: an earlier start's."""
    given, default = _keys(asked.model_dump(mode="json", exclude_unset=True)), _keys(asked.model_dump(mode="json"))
    return {
        key: value
        for key, value in _keys(acting.model_dump(mode="json")).items()
        if _is_training(key) and value is not None and value != default.get(key) and key not in given
    }


def _is_training(key: str) -> bool:
    """Whether a key, section.key or section.table.key, is one of TRAINING."""
    section, name = key.split(".")[:2]
    return section in TRAINING and (not TRAINING[section] or name in TRAINING[section])


def _keys(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as section.key -> value; the lines of [optimizer.rules], whose order counts, are one value."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        found |= _keys(value, f"{path}.") if isinstance(value, dict) and path != "optimizer.rules" else {path: value}
    return found


def _tables(keys: Mapping[str, Any]) -> dict[str, Any]:
    """The nested tables of `_keys`."""
    tables: dict[str, Any] = {}
    for key, value in keys.items():
        *path, name = key.split(".")
        table = tables
        for part in path:
            table = table.setdefault(part, {})
        table[name] = value
    return tables


def refuse_foreign(path: str, meta: CheckpointMeta, config: RunConfig, training: Stream | None) -> None:
    """Refuse a checkpoint of another model, or one whose past is not that of this run: what it read up to the checkpoint.

    Args:
        training: the training stream; None where only the weights are taken.

    Raises:
        ValueError: one sentence.
    """
    _refuse_other_model(path, meta.config.get("model", {}), config.model)
    if training is None:
        return
    if difference := other_past(training, meta, config):
        raise ValueError(_refusal(path, difference))


def other_past(training: Stream, meta: CheckpointMeta, config: RunConfig) -> str:
    """How a configuration's training stream contradicts what a checkpoint's run had read, in words; "" where it does not."""
    try:
        before = read_plan(meta.extra["data_plan"])
    except (ValueError, KeyError):  # of 0.1.0, which knows only whether all of the order is the same
        return _other_order(meta, config, training.fingerprint)
    return training.plan().other_past(before, next_batch(meta))


def _other_order(meta: CheckpointMeta, config: RunConfig, corpus: str) -> str:
    ours = config.model_dump(mode="json")
    for section, key in DATA_ORDER:
        before = meta.config.get(section, {}).get(key)
        if before is not None and before != ours[section][key]:
            return f"{section}.{key} was {before} and is {ours[section][key]}"
    before = meta.fingerprints.get("corpus")
    if before is None or before == corpus:
        return ""
    was, now = str(before)[:FINGERPRINT_DIGITS], corpus[:FINGERPRINT_DIGITS]
    return f"the fingerprint of corpora, mixture and curriculum was {was} and is {now}"


def _refuse_other_model(path: str, checkpoint: dict[str, Any], ours: ModelConfig) -> None:
    """Refuse a checkpoint whose [model] has another value of a key that decides what the network computes."""
    now = ours.effective()
    try:
        theirs = ModelConfig.model_validate(checkpoint)
        before, shapes = theirs.effective(), _first_other_shape(theirs, ours)
    except ValidationError:  # of another version
        before, shapes = checkpoint, ""
    changed = [key for key in ModelConfig.structure() if key in before and before[key] != now.get(key)]
    if changed:
        values = " and ".join(f"its model.{key} is {before[key]}, this run's {now.get(key)}" for key in changed)
        raise ValueError(
            f"checkpoint {path} is of another model: {values}{shapes}; "
            "use its configuration, another run.dir, or checkpoint.resume=never"
        )


def _first_other_shape(theirs: ModelConfig, ours: ModelConfig) -> str:
    """The first parameter that two networks do not share, in words."""
    before, now = parameter_specs(theirs), parameter_specs(ours)
    for name in [*now, *before]:
        shapes = [f"{[*specs[name].shape]}" if name in specs else "none" for specs in (before, now)]
        if shapes[0] != shapes[1]:
            return f" (so {name} is {shapes[0]} there and {shapes[1]} here)"
    return ""


def _refusal(path: str, what: str) -> str:
    return (
        f"resuming from {path} would change the order of the data: {what}; restore it, or start a new run from its weights "
        f"with run.dir=NEW checkpoint.resume={path} checkpoint.reset_optimizer=true"
    )


def rate_remark(meta: CheckpointMeta, config: RunConfig) -> str:
    """One sentence where resuming raises the schedule's multiplier above that of the last update; else "".

    A rise that the checkpoint's own configuration has (a warm-up) does not count.
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
        f"update {meta.step + 1}, because train.steps or [schedule] changed; to continue at the low rate, use "
        f"schedule.kind=piecewise schedule.points=[[0,{last:.4g}]]"
    )


def resume_differences(asked: RunConfig, acting: RunConfig, meta: CheckpointMeta, path: str, weights_only: bool) -> list[str]:
    """One line for each value that differs from the resumed checkpoint's or was taken over from it."""
    changed = changed_values(meta.config, acting.model_dump(mode="json"))
    lines = [f"changed since {path}: {line}" for line in changed]
    if not weights_only:
        lines += inherited(asked, acting, meta, path)
        lines += [
            ended_ramp(asked, acting, meta),
            extended_ramp(asked, acting, meta),
            left_behind(meta.step, next_batch(meta)),
            rate_remark(meta, acting),
        ]
    return [line for line in lines if line]
