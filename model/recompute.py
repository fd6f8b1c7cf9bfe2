"""Selective recomputation: the backward recomputes a block, except for the products that its forward kept.

torch's own selective contexts count every operation of a region and demand that the recomputation runs exactly as many.
Under ZeRO 3 a region holds DeepSpeed's gathering of weights too, and how much of that there is depends on what ran
before. Here only the kept operations are counted.
"""

from collections import defaultdict, deque
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import CheckpointPolicy

KEPT = ("aten.mm", "aten.addmm", "aten.bmm", "attention", "tiglon.")
"""Parts of the names of operations whose results are kept: matrix products and attention. Norms, rotations, SiLU and the
sums over tensor-parallel ranks are computed again."""


def is_kept(operation: object) -> bool:
    """Whether the result of an operation is expensive to compute again."""
    name = str(operation)
    return any(part in name for part in KEPT)


def policy(context: object, operation: object, *arguments: object, **keywords: object) -> CheckpointPolicy:
    """The same rule for torch's own contexts, which torch.compile understands."""
    return CheckpointPolicy.MUST_SAVE if is_kept(operation) else CheckpointPolicy.PREFER_RECOMPUTE


def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """For one block: around its forward, and around its recomputation in the backward."""
    results: dict[Any, deque[Any]] = defaultdict(deque)
    return _Keep(results), _Reuse(results)


class _Kept:
    """A result, which nothing may change in place before it is used again."""

    def __init__(self, value: Tensor):
        self.value, self.version = value.detach(), value._version

    def take(self) -> Tensor:
        if self.value._version != self.version:
            raise RuntimeError("a result kept for recomputation was changed in place")
        return self.value


class _Keep(TorchDispatchMode):
    def __init__(self, results: dict[Any, deque[Any]]):
        super().__init__()
        self.results = results

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if is_kept(func):
            self.results[func].append(tree_map(lambda x: _Kept(x) if isinstance(x, Tensor) else x, out))
        return out


class _Reuse(TorchDispatchMode):
    def __init__(self, results: dict[Any, deque[Any]]):
        super().__init__()
        self.results = results

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not is_kept(func):
            return func(*args, **(kwargs or {}))
        return tree_map(lambda x: x.take() if isinstance(x, _Kept) else x, self.results[func].popleft())
