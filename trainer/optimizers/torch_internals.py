"""Functions of torch without a documented interface, each behind a function of its own.

tests/trainer/optimizers/test_torch_internals.py checks them on the installed torch.
"""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from trainer.private_api import private_attribute

PRIVATE_FUNCTIONS = {
    "_foreach_norm": (torch, "the RMS of all parameters in a few launches on a GPU"),
    "_foreach_mul": (torch, "the RMS of all parameters in a few launches on a GPU"),
    "adamw": (import_module("torch.optim.adamw"), "AdamW's fused kernel with the step count handed in"),
    "sgd": (import_module("torch.optim.sgd"), "the decay of AdamW's moments in a step that is skipped on the device"),
}
"""Private attribute -> its module, and what relies on it."""


def _private(name: str) -> Any:
    owner, purpose = PRIVATE_FUNCTIONS[name]
    return private_attribute("torch", owner, name, purpose)


def l2_norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """L2 norm of each tensor, summed in float32; 0-dim float32. A few launches for all of them."""
    return _private("_foreach_norm")(list(tensors), dtype=torch.float32)


def scaled(tensors: Sequence[Tensor], factors: Sequence[float]) -> list[Tensor]:
    """Each tensor times its factor. A few launches for all of them."""
    return _private("_foreach_mul")(list(tensors), list(factors))


def fused_adamw(
    values: list[Tensor], gradients: list[Tensor], momenta: list[Tensor], second_moments: list[Tensor], counts: list[Tensor],
    **options: Any,
) -> None:  # fmt: skip
    """One step of AdamW in place.

    Args:
        counts: finished updates, 0-dim float32, one per tensor; the kernel adds 1 before it corrects the bias.
        options: lr, beta1, beta2, weight_decay, eps; grad_scale, a 0-dim float32 divisor of the gradients, or None; found_inf,
            0-dim float32, where 1 leaves everything as it is, or None.
    """
    _private("adamw")(
        values, gradients, momenta, second_moments, [], counts, fused=True, amsgrad=False, maximize=False, **options
    )  # fmt: skip


def decay_unless(keep: Tensor, tensors: list[Tensor], beta: float) -> None:
    """tensors <- beta tensors, in place, unless `keep` (0-dim bool on their device): then no bit changes.

    By torch's fused SGD with each tensor as its own gradient, x - (1 - beta) x, whose kernel ends at once where `found_inf`
    is 1. A product with 1 would read and write all of them in every step.
    """
    _private("sgd")(
        tensors, tensors, [None] * len(tensors), fused=True, found_inf=keep.float(), lr=1.0 - beta,
        weight_decay=0.0, momentum=0.0, dampening=0.0, nesterov=False, maximize=False,
    )  # fmt: skip
