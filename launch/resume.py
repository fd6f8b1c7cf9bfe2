"""May this run carry on from that checkpoint, and what has changed since."""

from typing import Any

from pydantic import ValidationError

from launch.config import RunConfig
from model.config import ModelConfig
from trainer.config import ScheduleConfig
from trainer.manifest import Meta
from trainer.schedule import multiplier

SHAPES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "tie_word_embeddings", "tied_head", "attention", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim",
    "qk_rope_head_dim", "v_head_dim", "qk_norm",
)  # fmt: skip
"""What makes another model of it."""
ORDER = (("run", "seed"), ("train", "sequence_length"), ("train", "global_batch_size"))
"""What decides, beside the corpus, which tokens batch n holds."""


def source_of(config: RunConfig, own: str | None) -> tuple[str | None, bool]:
    """Which checkpoint a run carries on from, and whether only its weights count.

    A run that asks for the weights of another carries on from its own checkpoints once it has any.

    Args:
        own: the run's own newest checkpoint.
    """
    match config.checkpoint.resume:
        case "never":
            return None, False
        case "auto":
            return own, False
        case path if config.checkpoint.reset_optimizer:
            return own or path, own is None
        case path:
            return path, False


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
