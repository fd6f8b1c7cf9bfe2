"""Tiger, Lion, AdamW and Muon on whole tensors by their formulas, and Tiger and Muon folded into their momenta."""

import fnmatch
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.combinations.network import Weights, wide
from tests.combinations.weights import MATRICES, VECTORS, centre, kind, router_biases
from tests.orthogonal import Polynomials, by_singular_values, polynomials


@dataclass
class State:
    """Everything an update changes, by parameter name."""

    weights: Weights
    momentum: Weights = field(default_factory=dict)
    second_moment: Weights = field(default_factory=dict)
    biases: Weights = field(default_factory=dict)
    """Of the routers."""


@dataclass(frozen=True)
class Rule:
    """What moves one parameter."""

    name: str
    seen_rows_only: bool
    values: dict[str, Any]
    """Of the rule's section, with what [optimizer.rules] changes for this parameter."""

    @property
    def peak(self) -> float:
        """Peak learning rate."""
        return self.values["learning_rate"]

    @property
    def betas(self) -> Sequence[float]:
        """Coefficients of the averages."""
        return [self.values["beta"]] if self.name in ("tiger", "muon") else self.values["betas"]


def rule(config: Any, name: str) -> Rule:
    """The rule of a parameter: by the first line of [optimizer.rules] that fits, else the one that optimizer.name names, or
    where that is Muon and the parameter no matrix of a layer, Muon's `others`."""
    o, own_kind = config.optimizer, kind(name)
    usual = o.muon.others if o.name == "muon" and own_kind not in MATRICES else o.name
    for pattern, choice in o.rules.items():
        line = choice.model_dump()
        own, rows = line.pop("rule", None) or usual, line.pop("rows", "all")
        head_too = pattern == "matrix" and own_kind == "head" and (choice.rule or o.name) != "muon"
        fits = (
            head_too or pattern == own_kind or (pattern == "matrix" and own_kind in MATRICES) or fnmatch.fnmatch(name, pattern)
        )
        if fits and (own != "muon" or own_kind in MATRICES):
            return Rule(own, rows == "seen", {**getattr(o, own).model_dump(), **line})
    return Rule(usual, False, getattr(o, usual).model_dump())


def start(config: Any, weights: Weights) -> State:
    """These weights with moments of zero; a second moment for what AdamW moves."""
    zeros = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    second = {name: torch.zeros_like(weight) for name, weight in weights.items() if rule(config, name).name == "adamw"}
    return State(dict(weights), zeros, second, router_biases(config))


def norm(gradients: Weights) -> float:
    """Of all gradients together, not finite if an element is not."""
    return math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients.values()))


def clipping(config: Any, gradient_norm: float) -> float:
    """What gradients are multiplied by so that their norm is at most max_grad_norm (default 1; 0 = no limit)."""
    limit = config.optimizer.max_grad_norm
    limit = 1.0 if limit is None else limit
    return min(1.0, limit / (gradient_norm + 1e-6)) if limit else 1.0


def update(
    config: Any, state: State, gradients: Weights, number: int, multiplier: float, floors: dict[str, float], seen_V: Tensor
) -> tuple[State, float]:
    """The state after update `number` (from 1) and the gradient norm before clipping.

    Args:
        gradients: of the mean loss, whole tensors.
        multiplier: the schedule's.
        floors: Tiger's least RMS by name.
        seen_V: bool, rows of the embedding whose token was an input of this update (rows = "seen").
    """
    size = norm(gradients)
    after, scale = State({}, {}, {}), clipping(config, size) if math.isfinite(size) else 0.0
    for name, p in state.weights.items():
        g = gradients[name] * scale if math.isfinite(size) else None
        match rule(config, name).name:
            case "adamw":
                _adamw(config, name, state, after, g, number, multiplier, seen_V)
            case "lion":
                beta1, beta2 = rule(config, name).betas
                m = state.momentum[name]
                direction = None if g is None else (beta1 * m + (1 - beta1) * g).sign()
                after.momentum[name] = beta2 * m + (0 if g is None else (1 - beta2) * g)
                rate = multiplier * rule(config, name).peak * _seen(config, name, seen_V)
                after.weights[name] = p if g is None else p - rate * (direction + _decay(config, name) * p)
            case "muon":
                (beta,) = rule(config, name).betas
                m = after.momentum[name] = beta * state.momentum[name] + (0 if g is None else (1 - beta) * g)
                nesterov = g is not None and rule(config, name).values["nesterov"]
                u = beta * m + (1 - beta) * g if nesterov else m
                after.weights[name] = p if g is None else muon(config, name, p, u, multiplier)
            case "tiger":
                (beta,) = rule(config, name).betas
                after.momentum[name] = beta * state.momentum[name] + (0 if g is None else (1 - beta) * g)
                after.weights[name] = tiger(
                    config, name, p, after.momentum[name], multiplier, floors, None if g is None else seen_V
                )  # fmt: skip
    return after, size


def tiger(
    config: Any, name: str, p: Tensor, m: Tensor, multiplier: float, floors: dict[str, float], seen_V: Tensor | None
) -> Tensor:
    """p - rate (sign m + decay p). seen_V = None stands for an update whose gradients are not finite."""
    if seen_V is None:
        start = centre(config, name)
        return start + 0.99 * (p - start) if rule(config, name).values["non_finite"] == "shrink" else p
    rate: Any = multiplier * rule(config, name).peak
    if kind(name) in VECTORS:
        rate = rate / 2
    elif kind(name) == "embedding" and rule(config, name).values["embedding_rms"] == "row":
        rate = rate * p.square().mean(dim=1, keepdim=True).sqrt().clamp(min=floors[name])
    else:
        rate = rate * max(p.square().mean().sqrt().item(), floors[name])
    rate = rate * _seen(config, name, seen_V)
    return p - rate * (m.sign() + _decay(config, name) * p)


def muon(config: Any, name: str, p: Tensor, u: Tensor, multiplier: float) -> Tensor:
    """p - rate (scale orthogonalised(u) + decay p)."""
    values = rule(config, name).values
    rows, columns = p.shape
    scale = {
        "match-rms-adamw": 0.2 * math.sqrt(max(rows, columns)), "original": math.sqrt(max(1.0, rows / columns)),
        "mup": math.sqrt(rows / columns), "none": 1.0,
    }[values["scale"]]  # fmt: skip
    steps = polynomials(values["newton_schulz"], values["newton_schulz_steps"])
    exact = p.dtype == torch.float64 or values["precision"] == "fp32"
    direction = by_singular_values(u.double(), steps) if exact else _iterated(u.bfloat16(), steps)
    return p - multiplier * rule(config, name).peak * (scale * direction.to(p.dtype) + _decay(config, name) * p)


def _iterated(u: Tensor, steps: Polynomials) -> Tensor:
    """The iteration in the precision of u."""
    x = u / u.norm().clamp(min=1e-7)
    for a, b, c in steps:
        inner = x @ x.T if x.shape[0] <= x.shape[1] else x.T @ x
        mixed = b * inner + c * (inner @ inner)
        x = a * x + (mixed @ x if x.shape[0] <= x.shape[1] else x @ mixed)
    return x


def clip_logits(config: Any, weights: Weights, largest_LN: Tensor, store: Callable[[Tensor], Tensor]) -> None:
    """Multiply the rows behind logits above optimizer.qk_clip head by head, in place; `store` is how the result is kept."""
    model, changed = config.model, dict[str, Tensor]()
    N, K = model.num_attention_heads, model.num_key_value_heads or model.num_attention_heads

    def multiply(name: str, first: int, count: int, factor: float) -> None:
        for full in (f"{name}.weight", f"{name}.bias"):
            if full in weights:
                changed.setdefault(full, weights[full].clone())[first : first + count] *= factor

    for layer, largest_N in enumerate(largest_LN.tolist()):
        own = f"model.layers.{layer}.self_attn."
        for head, largest in enumerate(largest_N):
            factor = min(1.0, config.optimizer.qk_clip / max(largest, 1e-30))
            if model.attention == "mla":
                nope, rope, value = model.qk_nope_head_dim, model.qk_rope_head_dim, model.v_head_dim
                queries = own + ("q_b_proj" if model.q_lora_rank else "q_proj")
                multiply(queries, head * (nope + rope), nope, math.sqrt(factor))
                multiply(queries, head * (nope + rope) + nope, rope, factor)
                multiply(f"{own}kv_b_proj", head * (nope + value), nope, math.sqrt(factor))
                continue
            size = model.head_dim or model.hidden_size // N
            multiply(f"{own}q_proj", head * size, size, math.sqrt(factor) if K == N else factor)
            if K == N:
                multiply(f"{own}k_proj", head * size, size, math.sqrt(factor))
    weights.update({name: store(weight) for name, weight in changed.items()})


def _seen(config: Any, name: str, seen_V: Tensor) -> Any:
    """1 for rows that are updated."""
    return seen_V[:, None] if rule(config, name).seen_rows_only else 1


def _decay(config: Any, name: str) -> float:
    """Gains and biases are exempt."""
    return 0.0 if kind(name) in VECTORS else rule(config, name).values["weight_decay"]


def _adamw(
    config: Any, name: str, state: State, after: State, g: Tensor | None, number: int, multiplier: float, seen_V: Tensor
) -> None:
    own = rule(config, name)
    beta1, beta2 = own.betas
    rate = multiplier * own.peak * _seen(config, name, seen_V)
    p = state.weights[name]
    m = beta1 * state.momentum[name] + (0 if g is None else (1 - beta1) * g)
    v = beta2 * state.second_moment[name] + (0 if g is None else (1 - beta2) * g * g)
    mean, square = m / (1 - beta1**number), v / (1 - beta2**number)
    step = mean / (square.sqrt() + own.values["eps"]) + _decay(config, name) * p
    after.weights[name] = p if g is None else p - rate * step
    after.momentum[name], after.second_moment[name] = m, v


class Store:
    """How the fold engine keeps weights and momenta: as they are, or rounded to bfloat16 (by optimizer.rounding)."""

    def __init__(self, config: Any, dtype: torch.dtype, seed: int):
        self.narrow = dtype == torch.bfloat16
        self.stochastic = config.optimizer.rounding == "stochastic"
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, x: Tensor) -> Tensor:
        """x as it is kept."""
        if not self.narrow:
            return x
        if self.stochastic:
            noise = torch.randint(0, 1 << 16, x.shape, generator=self.generator, dtype=torch.int32)
            x = (x.contiguous().view(torch.int32) + noise).bitwise_and(-65536).view(torch.float32)
        return x.bfloat16().float()


def fold(
    config: Any,
    state: State,
    parts: Sequence[Weights],
    multiplier: float,
    floors: dict[str, float],
    seen_V: Tensor,
    *,
    data_ranks: int,
    store: Store,
) -> tuple[State, float]:
    """Tiger with the momentum as accumulator: the state after an update, and the norm that is reported.

    Args:
        parts: for each micro-batch, rank after rank, the gradients of its part of the mean loss; their sum is the gradient.
        data_ranks: ranks that share the micro-batches equally; the mean of their momenta is the momentum.
        store: rounds what is kept after every change.

    Returns:
        The norm is the root of the mean, over micro-batches and ranks, of the squared norm of a micro-batch's gradient, each
        counted as if it were the whole update's: times the number of parts.
    """
    size = math.sqrt(sum((len(parts) * norm(part)) ** 2 for part in parts) / len(parts))
    share = len(parts) // data_ranks
    after = State({}, {}, {})
    for name, p in state.weights.items():
        ends = []
        (beta,) = rule(config, name).betas
        for rank in range(data_ranks):
            m = state.momentum[name]
            for index, part in enumerate(parts[rank * share : (rank + 1) * share]):
                g = part[name] if part[name].isfinite().all() else torch.zeros_like(m)
                m = store((1.0 if index else beta) * m + (1 - beta) * data_ranks * g)
            ends.append(m)
        m = store(torch.stack(ends).mean(dim=0)) if data_ranks > 1 else ends[0]
        after.momentum[name] = m
        if rule(config, name).name == "muon":
            moved = muon(config, name, p, m, multiplier) if math.isfinite(size) else p
        else:
            moved = tiger(config, name, p, m, multiplier, floors, seen_V if math.isfinite(size) else None)
        after.weights[name] = p if moved is p else store(moved)
    return after, size


def held(weights: Weights, dtype: torch.dtype, folded: bool) -> Weights:
    """The weights as training begins with them: float64, or float32 that fold has rounded to `dtype`."""
    if dtype == torch.float64:
        return {name: weight.double() for name, weight in weights.items()}
    return {name: wide(weight.to(dtype)) if folded else weight.float() for name, weight in weights.items()}
