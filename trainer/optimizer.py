"""One optimizer step over fragments: Tiger, Lion or AdamW, whatever part of each tensor this rank holds.

The step knows the kind of each parameter, the RMS of whole tensors and the norm of all gradients; the rules themselves
are in trainer/tiger.py, lion.py and adamw.py.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.config import ModelConfig
from model.parallel import Topology
from trainer import adamw, lion, onepass, tiger
from trainer.config import OptimizerConfig, ParallelConfig
from trainer.fragments import Block, Fragment, block_limit, blocks
from trainer.totals import Totals, totals

RELATIVE_RATES = (1e-5, 0.05)
"""A Tiger rate outside of these was meant as an absolute one, or as a percentage: published rates are 1e-3 to 2e-3."""


@dataclass(frozen=True)
class Update:
    """What a step did: 0-dim tensors on the device, to be read when they are logged."""

    grad_norm: Tensor
    """Global L2 norm before clipping."""
    skipped: Tensor
    """bool: a gradient was not finite and no weight took a step."""


def update(
    fragments: list[Fragment],
    settings: OptimizerConfig,
    learning_rate: float,
    topology: Topology,
    *,
    step: int,
    rms_floor: Mapping[str, float],
    seen_V: Tensor | None = None,
    partitioned: bool,
) -> Update:
    """Move every weight once. All ranks call it, with the same parameters in the same order.

    Args:
        fragments: what this rank holds, with gradients of the mean loss; possibly empty, never missing.
        settings: rule, coefficients, decay, clipping.
        learning_rate: of this step, warm-up and decay applied.
        step: number of this update from 1 (AdamW's bias correction).
        rms_floor: least RMS that scales Tiger's rate of a parameter, by its name (model/decoder.py, rms_floors).
        seen_V: for `embedding = "lazy"`, which rows of the whole vocabulary occurred (see row_mask).
        partitioned: True under ZeRO, whose data-parallel ranks hold different parts.

    Non-finite gradients anywhere count as zero everywhere: momenta decay, weights stay (or shrink, if asked to).
    """
    sized, by_row = wanted(fragments, settings)
    found = totals(fragments, topology, sized=sized, by_row=by_row, partitioned=partitioned)
    fine = torch.isfinite(found.gradient_norm)
    bad: Any = ~fine
    scale: Any = torch.where(fine, _clip(found.gradient_norm, settings.clipping), 0.0)
    if scale.device.type == "cpu":
        bad, scale = bool(bad), scale.item()
    _adamw(fragments, settings, learning_rate, step, scale if settings.clipping else 1.0, bad)
    signed = [f for f in fragments if rule(f.kind, settings) != "adamw" and f.values.numel()]
    at_once = [f for f in signed if settings.compile and not differ_by_row(f, settings)]
    _signed_at_once(at_once, settings, learning_rate, found, rms_floor, scale, bad)
    for fragment in signed:
        if not settings.compile or differ_by_row(fragment, settings):
            rms = found.row_rms.get(fragment.name, found.rms.get(fragment.name, 0.0))
            rate, decay = rate_and_decay(fragment, settings, learning_rate, rms, rms_floor, seen_V)
            _signed(fragment, settings, rate, decay, scale, bad)
    return Update(grad_norm=found.gradient_norm.float(), skipped=~fine)


def rule(kind: str, settings: OptimizerConfig) -> str:
    """Which update a parameter of this kind gets."""
    return "adamw" if kind == "embedding" and settings.embedding == "adamw" else settings.name


def rate_and_decay(
    fragment: Fragment,
    settings: OptimizerConfig,
    learning_rate: float,
    rms: Any,
    rms_floor: Mapping[str, float],
    seen_V: Tensor | None,
) -> tuple[Any, float]:
    """What a fragment really gets under Tiger or Lion; the rate is one for each row where rows differ."""
    if settings.name == "tiger":
        rate, decay = tiger.rate_and_decay(fragment.kind, learning_rate, rms, rms_floor[fragment.name], settings.decay)
    else:
        rate, decay = learning_rate, 0.0 if fragment.kind in ("gain", "bias") else settings.decay
    if fragment.kind == "embedding" and settings.embedding == "lazy":
        assert seen_V is not None, "embedding = 'lazy' needs the rows that occurred"
        first = fragment.slice_start[0]
        rate = rate * seen_V[first : first + fragment.slice_shape[0]].to(fragment.values.device, torch.float64)
    return rate, decay


def differ_by_row(fragment: Fragment, settings: OptimizerConfig) -> bool:
    """Whether the rows of a parameter have rates of their own."""
    by_rms = settings.name == "tiger" and settings.embedding_rms == "row"
    return fragment.kind == "embedding" and (by_rms or settings.embedding == "lazy")


def rates_and_decays(
    fragments: Sequence[Fragment],
    settings: OptimizerConfig,
    learning_rate: float,
    found: Totals,
    rms_floor: Mapping[str, float],
) -> tuple[Tensor, list[float]]:
    """As rate_and_decay, of many fragments whose rows have one rate: float32 [fragments] on their device, and decays.

    A few launches for all of them: on a GPU each of them alone would take longer to ask for than a small tensor to move.
    """
    device = fragments[0].values.device
    no_floors = dict.fromkeys(rms_floor, 0.0)
    known = [rate_and_decay(f, settings, learning_rate, 1.0, no_floors, None) for f in fragments]
    if settings.name != "tiger":
        return onepass.sent([rate for rate, _ in known], device), [decay for _, decay in known]
    sized = [f.name in found.rms for f in fragments]
    floors = [rms_floor[f.name] if size else 0.0 for f, size in zip(fragments, sized)]
    base, least = onepass.sent([[rate for rate, _ in known], floors], device, torch.float64)
    if device.type == "cpu":
        rms = torch.tensor([found.rms.get(f.name, 1.0) for f in fragments], dtype=torch.float64)
    else:
        one = torch.ones((), device=device)
        rms = torch.stack([found.rms.get(f.name, one) for f in fragments]).double()
    return (base * rms.clamp(min=least)).float(), [decay for _, decay in known]


def rate_in(block: Block, rate: Any, dtype: torch.dtype) -> Any:
    """The rate of a block: a number, or a column of one for each of its rows."""
    if not isinstance(rate, Tensor):
        return rate
    return rate.to(dtype) if rate.ndim == 0 else rate[block.row : block.row + block.rows, None].to(dtype)


def allocate(fragments: list[Fragment], settings: OptimizerConfig) -> None:
    """Make every moment the rule keeps, as zeros: a second moment only for what AdamW moves."""
    for fragment in fragments:
        fragment.momentum()
        if rule(fragment.kind, settings) == "adamw":
            fragment.second_moment()


def decay_momentum(fragments: list[Fragment], settings: OptimizerConfig) -> None:
    """What becomes of the moments in a step that an engine left out before it came to update()."""
    for fragment in fragments:
        match rule(fragment.kind, settings):
            case "adamw":
                adamw.rest_([fragment.momentum()], [fragment.second_moment()], _adamw_settings(fragment, settings)[0])
            case _:
                fragment.momentum().mul_(settings.coefficients[-1])


def row_mask(ids: Sequence[Tensor], vocabulary: int, topology: Topology) -> Tensor:
    """Rows of the embedding that occurred in a step: bool [vocabulary], alike on all ranks.

    The ids of all micro-batches and data-parallel ranks count, never the gradients: those miss rows (the last
    micro-batch alone) or find too many (tied weights). Tensor-parallel ranks see the same ids.
    """
    seen = torch.zeros(vocabulary, dtype=torch.uint8, device=topology.device)
    for tokens in ids:
        seen[tokens.reshape(-1).to(topology.device, non_blocking=True)] = 1
    if topology.data_group is not None:
        dist.all_reduce(seen, op=dist.ReduceOp.MAX, group=topology.data_group)
    return seen.bool()


def check(settings: OptimizerConfig, model: ModelConfig, parallel: ParallelConfig) -> None:
    """Refuse what cannot work.

    Raises:
        ValueError: one sentence with the reason and the way out.
    """
    if settings.embedding == "lazy" and model.tie_word_embeddings:
        raise ValueError(
            "optimizer.embedding = 'lazy' cannot be used with model.tie_word_embeddings = true: the softmax gives every row "
            "a gradient each step, and lazy rows would drop it; use embedding = 'plain', or untie the embeddings"
        )
    if settings.embedding_rms == "row" and rule("embedding", settings) != "tiger":
        mover = rule("embedding", settings)
        raise ValueError(f"optimizer.embedding_rms = 'row' scales Tiger's rate, but {mover} moves the embedding; remove it")
    own_rate = ("embedding_learning_rate", settings.embedding_learning_rate, "embedding_weight_decay")
    table = (("learning_rate", settings.rate, "weight_decay", settings.decay), (*own_rate, settings.embedding_weight_decay))
    for rate_key, rate, decay_key, decay in table:
        if rate * decay >= 1:
            raise ValueError(
                f"optimizer.{rate_key} = {rate:g} times optimizer.{decay_key} = {decay:g} is {rate * decay:g}: an update would "
                "take away all of a weight and more; make one of them smaller"
            )
    if parallel.engine == "fold":
        _check_fold(settings)


def _check_fold(settings: OptimizerConfig) -> None:
    name = rule("embedding", settings)
    if name == "lion" or settings.name == "lion":
        raise ValueError(
            "parallel.engine = 'fold' cannot run optimizer.name = 'lion': Lion mixes momentum and mean gradient in two ways "
            "and so needs both; use name = 'tiger', or engine = 'zero'"
        )
    if name == "adamw":
        where = "name" if settings.name == "adamw" else "embedding"
        raise ValueError(
            f"parallel.engine = 'fold' cannot run optimizer.{where} = 'adamw': AdamW needs the square of the mean gradient, "
            "which is not known before the last micro-batch; use Tiger with embedding = 'plain' or 'lazy', or engine = 'zero'"
        )
    if settings.max_grad_norm:
        raise ValueError(
            f"parallel.engine = 'fold' cannot clip (optimizer.max_grad_norm = {settings.max_grad_norm:g}): each gradient is "
            "gone before the global norm is known; leave it out or 0, since Tiger's sign bounds every step by itself"
        )


def remarks(settings: OptimizerConfig, model: ModelConfig) -> list[str]:
    """Sentences for the user about settings that work but are probably not meant."""
    found = []
    low, high = RELATIVE_RATES
    if settings.name == "tiger" and not low <= settings.rate <= high:
        found.append(
            f"optimizer.learning_rate = {settings.rate:g} looks like an absolute rate: Tiger's is relative to the RMS of each "
            f"matrix, 1e-3 to 2e-3 as published, sensible between {low:g} and {high:g}"
        )
    if settings.name != "adamw" and settings.embedding == "plain" and not model.tie_word_embeddings:
        speed = "exponentially" if settings.embedding_rms == "row" else "steadily"
        found.append(
            f"an untied embedding with optimizer.embedding = 'plain' drifts under {settings.name}: rows of tokens that stay "
            f"away move {speed} towards 1 / weight_decay (kexue 9736); use embedding = 'lazy' or 'adamw', or tie the embeddings"
        )
    return found


def wanted(fragments: list[Fragment], settings: OptimizerConfig) -> tuple[set[str], set[str]]:
    """Names whose RMS the step needs: of the whole tensor, and by rows."""
    if settings.name != "tiger":
        return set(), set()
    rows = settings.embedding_rms == "row"
    large = [f for f in fragments if f.kind in ("matrix", "embedding") and rule(f.kind, settings) == "tiger"]
    by_row = {f.name for f in large if f.kind == "embedding" and rows}
    return {f.name for f in large} - by_row, by_row


def _clip(norm: Tensor, limit: float) -> Tensor:
    """What gradients are multiplied by; 1 without a limit (as torch.nn.utils.clip_grad_norm_)."""
    return (limit / (norm + 1e-6)).clamp(max=1.0) if limit else torch.ones_like(norm)


def _signed_at_once(
    fragments: list[Fragment],
    settings: OptimizerConfig,
    learning_rate: float,
    found: Totals,
    rms_floor: Mapping[str, float],
    scale: Any,
    bad: Any,
) -> None:
    """Tiger or Lion by one compiled pass for each fragment."""
    if not fragments:
        return
    rates, decays = rates_and_decays(fragments, settings, learning_rate, found, rms_floor)
    chosen = onepass.numbers(settings, rates, decays, scale, bad)
    for fragment, own in zip(fragments, chosen.unbind(), strict=True):
        onepass.compiled(onepass.one_pass)(fragment.values, fragment.momentum(), fragment.gradient, own)
        if settings.non_finite == "shrink":
            tiger.shrink_(fragment.values, fragment.kind, bad)


def _signed(fragment: Fragment, settings: OptimizerConfig, rate: Any, decay: float, scale: Any, bad: Any) -> None:
    """Tiger or Lion on one fragment, part by part: what is in the cache is read, folded and moved at once."""
    if isinstance(bad, Tensor):
        rate = torch.where(bad, 0.0, rate)
    for values, momentum, gradient, own_rate in _parts(fragment, rate):
        usable: Tensor | None = gradient
        if isinstance(bad, Tensor):
            gradient.nan_to_num_(0.0, 0.0, 0.0)  # nobody knows yet whether it is bad; if so, it is scaled by 0
        elif bad:
            usable = None
        if settings.name == "lion":
            betas = (settings.coefficients[0], settings.coefficients[1])
            lion.step_(values, momentum, usable, betas, own_rate, decay, scale)
        else:
            beta = settings.coefficients[0]
            tiger.fold_(momentum, usable, beta, (1.0 - beta) * scale)
            if bad is not True:
                tiger.move_(values, momentum, own_rate, decay)
        if settings.non_finite == "shrink":
            tiger.shrink_(values, fragment.kind, bad)


def _parts(fragment: Fragment, rate: Any) -> Iterator[tuple[Tensor, Tensor, Tensor, Any]]:
    """Values, momentum, gradient and rate of a fragment in parts of a size that suits the device."""
    values, momentum, gradient = fragment.values, fragment.momentum(), fragment.gradient
    assert gradient is not None
    limit = block_limit(values.device)
    if isinstance(rate, Tensor) and rate.ndim == 1:
        for block in blocks(fragment.offset, values.numel(), fragment.width, limit):
            yield block.of(values), block.of(momentum), block.of(gradient), rate_in(block, rate, values.dtype)
    else:
        own_rate = rate.to(values.dtype) if isinstance(rate, Tensor) else rate
        for part in zip(values.split(limit), momentum.split(limit), gradient.split(limit), strict=True):
            yield *part, own_rate


def _adamw_settings(fragment: Fragment, settings: OptimizerConfig) -> tuple[tuple[float, float], float]:
    """Coefficients and decay of a fragment under AdamW."""
    if settings.name != "adamw":
        return adamw.BETAS, settings.embedding_weight_decay
    decay = 0.0 if fragment.kind in ("gain", "bias") else settings.decay
    return (settings.coefficients[0], settings.coefficients[1]), decay


def _adamw(fragments: list[Fragment], settings: OptimizerConfig, learning_rate: float, step: int, scale: Any, bad: Any) -> None:
    """AdamW on the fragments that are under it, those of equal decay in one call."""
    chosen = [f for f in fragments if rule(f.kind, settings) == "adamw" and f.values.numel()]
    rate = learning_rate
    if settings.name != "adamw":
        rate = settings.embedding_learning_rate * learning_rate / settings.rate  # the schedule's multiplier
    for decay in sorted({_adamw_settings(f, settings)[1] for f in chosen}):
        group = [f for f in chosen if _adamw_settings(f, settings)[1] == decay]
        adamw.step_(
            [f.values for f in group],
            [f.gradient for f in group if f.gradient is not None],
            [f.momentum() for f in group],
            [f.second_moment() for f in group],
            step=step, betas=_adamw_settings(group[0], settings)[0], rate=rate, decay=decay, eps=settings.eps,
            scale=scale, bad=bad,
        )  # fmt: skip
