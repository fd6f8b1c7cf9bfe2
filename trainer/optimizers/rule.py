"""The protocol of an update rule: what it keeps, what it must know, and how it moves a tensor.

A rule is its own section of the configuration, `[optimizer.NAME]`. It never sees a whole tensor: `accumulate` and `direction`
get whatever part a rank updates, as flat blocks or as rows x columns, and are used operation by operation, compiled, and by
the fold engine (trainer/engines/fold.py). They are static: what depends on the configuration reaches them in `scalars`, which
are floats, or 0-dim tensors in a compiled kernel.

In an update `accumulate` comes first, once with the mean gradient, or under fold once per micro-batch; then `accumulate_rows`,
once; then `direction`. A rule must say its defaults, `states` where they differ, `scalars`, `accumulate` and `direction`; all
else has a default. docs/extending.md adds one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from model.parameters import ParameterKind

KINDS: tuple[str, ...] = get_args(ParameterKind)
Beta = Annotated[float, Field(ge=0, lt=1)]
Betas = tuple[Beta, Beta]
Granularity = Literal["element", "row", "matrix"]
"""One number of a state per element, per row (a vector is one row), or per tensor."""


@dataclass(frozen=True)
class Statistic:
    """A root mean square over all ranks that hold a part of a tensor."""

    of: str
    """"values", "gradient" (clipped, the mean over the batch), or a state of granularity element, after `accumulate`."""
    over: Literal["row", "matrix"]


class Block(NamedTuple):
    """The part of a parameter that is updated at once: rows x columns, a single row where no row matters, flat if compiled."""

    values: Tensor
    gradient: Tensor
    """Scaled by clipping; zeros in a step whose gradient is NaN or infinite."""
    state: dict[str, Tensor]
    """By name: as `values` for granularity element, [rows, 1] for row, 0-dim for matrix."""
    measured: dict[Statistic, Tensor]
    """`UpdateRule.measures`: [rows, 1] or 0-dim."""


class UpdateRule(BaseModel):
    """An optimizer's configuration and arithmetic. The learning rate is the peak's; the schedule multiplies it.

    `kind` is that of a parameter: matrix, embedding, head, gain or bias (model/parameters.py).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    learning_rate: float = Field(gt=0)
    weight_decay: float = Field(ge=0)

    states: ClassVar[Mapping[str, Granularity]] = {"momentum": "element"}
    """Kept between updates, zeros at first; in a checkpoint as NAME/PARAMETER."""
    kinds: ClassVar[tuple[str, ...]] = KINDS
    """What the rule moves. Where that is not all, its key `others` names the section of the rule that moves the rest."""
    moves_absent_rows: ClassVar[bool] = False
    """Whether rows without a gradient take steps as large as all others, as under a sign (Su 2023, kexue.fm/archives/9736)."""
    library_kernel: ClassVar[bool] = False
    """Whether `update_together` does the update instead of `step`, where no row has a rate of its own."""

    @property
    def why_not_folded(self) -> str:
        """Why the fold engine cannot add micro-batches to the states one by one; "" if it can: each state of granularity
        element is then linear in the gradient, `direction` takes no gradient, and `measures` has no statistic of it."""
        return "its states are not linear in the gradient"

    def rate_and_decay(self, kind: str, learning_rate: float) -> tuple[float, float]:
        """Learning rate and weight decay of parameters of a kind: no decay of gains and biases."""
        return learning_rate, 0.0 if kind in ("gain", "bias") else self.weight_decay

    def relative_to(self, kind: str) -> Statistic | None:
        """The statistic that multiplies the learning rate, at least the parameter's floor; None = the rate is absolute."""
        return None

    def floor(self, initial: float) -> float:
        """Least value of that statistic, from a share of the deviation that the parameter is drawn with."""
        return initial

    def measures(self, kind: str) -> tuple[Statistic, ...]:
        """What `accumulate_rows` and `direction` need to know of a parameter of a kind."""
        return ()

    takes_scale: ClassVar[bool] = False
    """Whether `scalars` multiplies the factor of clipping into those of the gradient, which saves a pass over gradients."""

    def scalars(self, number: int, decays: bool = True, scale: Any = 1.0) -> dict[str, Any]:
        """Numbers for `accumulate`, `accumulate_rows` and `direction`.

        Args:
            number: of the update, from 1: bias corrections follow from it, so there is no counter to save.
            decays: False for all but the first micro-batch that fold adds: states decay once per update, so what multiplies
                a state in `accumulate` is then 1.
            scale: factor of the gradient, a float or 0-dim; not 1 only with `takes_scale`.
        """
        return {}

    @staticmethod
    def accumulate(state: dict[str, Tensor], gradient: Tensor, scalars: Mapping[str, Any]) -> None:
        """Add a gradient to the states of granularity element, in place."""
        raise NotImplementedError

    @staticmethod
    def accumulate_rows(
        state: dict[str, Tensor], measured: dict[Statistic, Tensor], scalars: Mapping[str, Any]
    ) -> None:  # fmt: skip
        """Renew the states of granularity row and matrix, [rows] and 0-dim, in place: once per parameter and update.

        Args:
            state: those alone.
            measured: `measures`, of the same shapes and dtype.
        """

    @staticmethod
    def direction(block: Block, scalars: Mapping[str, Any]) -> Tensor:
        """A new tensor u as large as the block's values, which become values - rate (u + decay values)."""
        raise NotImplementedError

    @classmethod
    def step(cls, block: Block, scalars: Mapping[str, Any]) -> Tensor:
        """`accumulate`, then `direction`."""
        cls.accumulate(block.state, block.gradient, scalars)
        return cls.direction(block, scalars)

    whole: ClassVar[bool] = False
    """Whether parameters move along `whole_directions`, not along `direction` itself."""

    def whole_dtype(self, own: torch.dtype) -> torch.dtype:
        """In which whole matrices travel and are computed with; `own` is that of weights, at least float32."""
        return own

    def whole_directions(self, matrices: Tensor) -> Tensor:
        """With `whole`: what becomes of what `direction` gave for all parts of matrices.

        Args:
            matrices: [matrices, rows, columns] of one shape, in `whole_dtype`; may be destroyed.
        """
        raise NotImplementedError

    def whole_scale(self, rows: int, columns: int) -> float:
        """Factor of `whole_directions`, applied when their parts are back."""
        return 1.0

    def whole_flops(self, rows: int, columns: int) -> float:
        """Operations of `whole_directions` for one matrix: by them the ranks share the work."""
        return 0.0

    @property
    def recovers(self) -> bool:
        """Whether `recover` does anything."""
        return False

    def recover(self, values: Tensor, centre: float, bad: Any) -> None:
        """What a step with a NaN or infinite gradient does to the values, in place; by default nothing.

        Args:
            centre: mean of the initial values: 0, and of a gain 1, unless it stands for 1 + w.
            bad: bool, or 0-dim bool where the device alone knows.
        """

    def update_together(self, tensors: "RuleTensors", step: "RuleStep") -> None:
        """With `library_kernel`: one update of many tensors of one weight decay, in place."""
        raise NotImplementedError

    def unused(self, kinds: set[str]) -> str:
        """A value that acts on none of the kinds of parameters that the rule moves: "KEY = VALUE ...", what to do; or ""."""
        return ""

    def remarks(self, section: str) -> list[str]:
        """One sentence for each setting that works but is probably not meant."""
        return []

    @classmethod
    def element_states(cls) -> list[str]:
        """Names of the states of granularity element."""
        return [name for name, granularity in cls.states.items() if granularity == "element"]

    def measures_of_states(self, kind: str) -> tuple[Statistic, ...]:
        """Those of `measures` that are known after `accumulate` only: a second pass over the parameter follows them."""
        return tuple(statistic for statistic in self.measures(kind) if statistic.of in self.states)

    def by_row(self, kind: str) -> bool:
        """Whether `direction` has anything per row or per matrix."""
        return bool(self.measures(kind)) or set(self.states.values()) != {"element"}


@dataclass(frozen=True)
class RuleTensors:
    """Flat tensors of several parameters that a library's kernel updates in one call."""

    values: list[Tensor]
    gradients: list[Tensor]
    states: list[dict[str, Tensor]]


@dataclass(frozen=True)
class RuleStep:
    """One update by a library's kernel."""

    number: int
    rate: float
    decay: float
    scale: Any = 1.0
    """Factor of the gradients: float or 0-dim (clipping)."""
    bad: Any = False
    """bool, or 0-dim bool: a gradient is not finite, so the states decay and the values stay."""


def average_(state: Tensor, gradient: Tensor, keep: Any, take: Any) -> None:
    """state <- keep state + take gradient, in place; floats, or tensors that broadcast."""
    if isinstance(take, Tensor):
        state.mul_(keep).add_(gradient * take)
    elif take == 1.0 - keep:
        state.lerp_(gradient, take)  # one pass for the usual case
    else:
        if keep != 1.0:
            state.mul_(keep)
        state.add_(gradient, alpha=take)


def apply_(values: Tensor, direction: Tensor, rate: Any, decay: Any) -> None:
    """values <- values - rate (direction + decay values); `direction` is destroyed. A rate of 0 leaves a value as it is.

    Args:
        rate: float, 0-dim, or [rows, 1].
    """
    if decay:
        # Not values * (1 - rate * decay): that factor is within a few ulp of 1 in float32, and its error would not average.
        direction.add_(values, alpha=decay)
    if isinstance(rate, Tensor):
        values.sub_(direction.mul_(rate))
    else:
        values.sub_(direction, alpha=rate)


def fresh(direction: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """The direction as a tensor that may be destroyed: a copy where a rule returns a state itself."""
    shares = any(direction.data_ptr() == other.data_ptr() for other in state.values())
    return direction.clone() if shares else direction


def zeros_of(values: Tensor, rows: int, granularity: Granularity) -> Tensor:
    """A state at the start: as `values`, or, at least in float32, [rows] or 0-dim."""
    wide = torch.float64 if values.dtype == torch.float64 else torch.float32
    match granularity:
        case "element":
            return torch.zeros_like(values)
        case "row":
            return torch.zeros(rows, dtype=wide, device=values.device)
        case "matrix":
            return torch.zeros((), dtype=wide, device=values.device)
