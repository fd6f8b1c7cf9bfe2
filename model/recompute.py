"""Selective recomputation: the backward recomputes a block, except for the matrix products that its forward saved.

torch's own selective contexts count every operation of a region and demand that the recomputation runs exactly as many.
Under ZeRO 3 a region holds DeepSpeed's gathering of weights too, and how much of that there is depends on what ran
before. Here only the saved operations are counted.
"""

from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy

SAVED_OPERATIONS = ("aten.mm", "aten.addmm", "aten.bmm", "aten.topk", "attention", "tiglon.")
"""Parts of the names of operations whose results are saved: matrix products, the choice of experts and attention. Norms,
rotations, SiLU and the sums over tensor-parallel ranks are recomputed."""


def is_saved(operation: object) -> bool:
    """Whether the result of an operation is saved, being expensive to recompute."""
    name = str(operation)
    return any(part in name for part in SAVED_OPERATIONS)


@contextmanager
def products_not_saved() -> Iterator[None]:
    """A context whose matrix products are recomputed all the same: of keys and values that ranks have gathered, which would
    take the memory that sharing a sequence frees. Compiled code does not ask and saves them."""
    if torch.compiler.is_compiling():
        yield
        return
    _Results.saves_products = False
    try:
        yield
    finally:
        _Results.saves_products = True


def selective_policy(context: object, operation: object, *arguments: object, **keywords: object) -> CheckpointPolicy:
    """The same rule for torch's own contexts, which torch.compile understands."""
    return CheckpointPolicy.MUST_SAVE if is_saved(operation) else CheckpointPolicy.PREFER_RECOMPUTE


def selective_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Contexts of one block, for torch.utils.checkpoint: its forward, and its recomputation in the backward."""
    results: dict[Any, deque[_SavedResult]] = defaultdict(deque)
    return _SaveResults(results), _ReuseResults(results)


def version_of(x: Tensor) -> int:
    """torch's count of the in-place changes of a tensor and its aliases, which torch keeps private."""
    return x._version


def detach_beneath_autograd(x: Tensor) -> Tensor:
    """x.detach() that shares the count of in-place changes with x. In a dispatch mode a plain detach has a count of its own;
    torch's own selective contexts clear the same dispatch key (torch.utils.checkpoint._detach_helper)."""
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return x.detach()


class _SavedResult:
    """What one operation returned, of which no tensor may change in place before the recomputation uses it."""

    def __init__(self, out: Any):
        self.several = isinstance(out, tuple)
        self.values = [detach_beneath_autograd(x) if isinstance(x, Tensor) else x for x in (out if self.several else (out,))]
        self.versions = self._versions()

    def _versions(self) -> list[int]:
        return [version_of(x) for x in self.values if isinstance(x, Tensor)]

    def take(self) -> Any:
        if self._versions() != self.versions:
            raise RuntimeError("a result saved for recomputation was changed in place")
        return tuple(self.values) if self.several else self.values[0]


class _Results(TorchDispatchMode):
    saves_products = True

    def __init__(self, results: dict[Any, deque[_SavedResult]]):
        super().__init__()
        self.results = results


class _SaveResults(_Results):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.saves_products and is_saved(func):
            self.results[func].append(_SavedResult(out))
        return out


class _ReuseResults(_Results):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        saved = self.saves_products and is_saved(func)
        return self.results[func].popleft().take() if saved else func(*args, **(kwargs or {}))
