"""Expert parallelism: ranks with the same dense weights that have different experts, and the exchange of tokens between them.

Of n ranks, rank r has the experts [r E / n, (r + 1) E / n) of every layer. A copy of a token travels to the rank of its expert,
its weight with it, and what the expert makes of it travels back (Lepikhin et al. 2020, GShard, arXiv 2006.16668). How many
copies each rank gets is told first, so that both sides know the sizes: nothing is padded and nothing dropped. Each exchange
begins in one call and is waited for in another, in the backward too, so that other work can stand between them.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class ExpertParallel:
    """The ranks that have different experts, as one of them sees it."""

    size: int = 1
    rank: int = 0
    group: Any = None

    def own(self, experts: int) -> range:
        """The experts of this rank, of so many in all."""
        each = experts // self.size
        return range(self.rank * each, (self.rank + 1) * each)

    @torch.no_grad()
    def tell(self, count_E: Tensor) -> "tuple[Splits, Tensor]":
        """The sizes of an exchange, and how many copies each rank sends to each of this rank's experts, [ranks, own experts].

        Args:
            count_E: copies that this rank has for each expert. The host waits for it.
        """
        received = torch.empty_like(count_E)
        dist.all_to_all_single(received, count_E.contiguous(), group=self.group)
        sent_Ne, received_Ne = count_E.view(self.size, -1), received.view(self.size, -1)
        sizes = torch.stack((sent_Ne.sum(1), received_Ne.sum(1))).tolist()
        return Splits(tuple(sizes[0]), tuple(sizes[1])), received_Ne

    def begin(self, x: Tensor, splits: "Splits") -> "Exchange":
        """Send rows of x to the ranks, in their order, as many as `splits` says."""
        return Exchange(x, splits, self.group)


ALL_EXPERTS = ExpertParallel()
"""Every rank has all experts."""


@dataclass(frozen=True)
class Splits:
    """Rows that a rank sends to and receives from each rank."""

    sent: tuple[int, ...]
    received: tuple[int, ...]

    @property
    def back(self) -> "Splits":
        """Of the way back."""
        return Splits(self.received, self.sent)


class Exchange:
    """Rows on their way between ranks."""

    def __init__(self, x: Tensor, splits: Splits, group: Any):
        self._travelling = _Travelling(group)
        self._splits = splits
        self._begun: Any = _Begin.apply(x, splits, self._travelling)

    def result(self) -> Tensor:
        """What the ranks have sent, in their order, once it is here."""
        return _Finish.apply(self._begun, self._splits, self._travelling)  # type: ignore[return-value]


class _Travelling:
    """A tensor that others write into, which no graph knows before it has arrived."""

    def __init__(self, group: Any):
        self.group = group
        self.sent: Tensor | None = None
        self.tensor: Tensor | None = None
        self.work: Any = None

    def begin(self, x: Tensor, splits: Splits) -> None:
        """Begin to send rows of x and to receive."""
        self.sent = x.contiguous()  # kept until it has left
        self.tensor = x.new_empty(sum(splits.received), *x.shape[1:])
        self.work = dist.all_to_all_single(
            self.tensor, self.sent, [*splits.received], [*splits.sent], group=self.group, async_op=True
        )

    def arrived(self) -> Tensor:
        """What was on its way, once it is here."""
        tensor, work = self.tensor, self.work
        assert tensor is not None, "nothing was on its way"
        self.sent = self.tensor = self.work = None
        work.wait()
        return tensor


class _Begin(torch.autograd.Function):
    """Begins an exchange; its own result is empty, and only a place in the graph. Its backward ends what that of `_Finish`
    began."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, splits: Splits, travelling: _Travelling) -> Tensor:
        ctx.travelling = travelling
        travelling.begin(x, splits)
        return x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return ctx.travelling.arrived(), None, None


class _Finish(torch.autograd.Function):
    """Waits for what `_Begin` began. Its backward begins to send the gradients back."""

    @staticmethod
    def forward(ctx: Any, begun: Tensor, splits: Splits, travelling: _Travelling) -> Tensor:
        ctx.splits, ctx.travelling = splits, travelling
        return travelling.arrived()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        ctx.travelling.begin(gradient, ctx.splits.back)
        return gradient.new_empty(0), None, None
