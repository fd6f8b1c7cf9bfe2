"""Optimizer sections, written short."""

from typing import Any

from trainer.optimizers.config import OptimizerConfig

COMMON = ("max_grad_norm", "compile", "rounding", "rules", "qk_clip")
SEEN = {"embedding": {"rows": "seen"}}
EMBEDDING_ADAMW = {"embedding": {"rule": "adamw", "weight_decay": 0.0}}


def optimizer(name: str = "tiger", **values: Any) -> OptimizerConfig:
    """The [optimizer] section; values that are not common to all rules go into the section of the rule."""
    common = {key: values.pop(key) for key in COMMON if key in values}
    return OptimizerConfig.model_validate({"name": name, **common, name: values})
