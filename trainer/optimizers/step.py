"""One update over fragments: Tiger, Lion or AdamW on whatever part of each tensor this rank holds.

Decided here: which rule, rate and decay a parameter gets, clipping, and what happens when a gradient is NaN or infinite. The
rules themselves are in trainer/optimizers/tiger.py, lion.py and adamw.py.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.config import ModelConfig
from model.parallel.mesh import Mesh
from trainer.config import OptimizerConfig, ParallelConfig
from trainer.optimizers import adamw, fused, lion, tiger
from trainer.optimizers.fragments import Fragment, FragmentBlock, block_limit, fragment_blocks
from trainer.optimizers.norms import TensorNorms, tensor_norms

RELATIVE_RATES = (1e-5, 0.05)
"""A Tiger rate outside this range was probably meant as an absolute one, or in percent: published rates are 1e-3 to 2e-3."""


@dataclass(frozen=True)
class UpdateStep:
    """What changes from one update to the next."""

    number: int
    """From 1 (AdamW's bias correction)."""
    learning_rate: float
    """Warm-up and decay applied."""
    seen_V: Tensor | None = None
    """For `embedding = "lazy"`: rows of the whole vocabulary that occurred (row_mask)."""


@dataclass(frozen=True)
class UpdateResult:
    """What an update did: 0-dim tensors on the device, to be read when they are logged."""

    grad_norm: Tensor
    """Global L2 norm before clipping."""
    skipped: Tensor
    """bool: a gradient was NaN or infinite, and no weight took a step."""


def update_fragments(
    fragments: list[Fragment],
    settings: OptimizerConfig,
    step: UpdateStep,
    mesh: Mesh,
    *,
    rms_floor: Mapping[str, float],
    partitioned: bool,
) -> UpdateResult:
    """Move every weight once. All ranks call it, with the same parameters in the same order.

    A NaN or infinite gradient on any rank makes all gradients count as zero on all ranks: momenta decay by beta, once, and the
    weights stay, or shrink with `non_finite = "shrink"`.

    Args:
        fragments: what this rank holds, with gradients of the mean loss; a fragment may be empty, none may be missing.
        rms_floor: least RMS that scales Tiger's rate of a parameter, by its name (model/initialization.py, rms_floors).
        partitioned: True under ZeRO, whose data-parallel ranks hold different parts.
    """
    rms_of, row_rms_of = names_with_rms(fragments, settings)
    norms = tensor_norms(fragments, mesh, rms_of=rms_of, row_rms_of=row_rms_of, partitioned=partitioned)
    fine = torch.isfinite(norms.gradient_norm)
    bad: Any = ~fine
    scale: Any = torch.where(fine, _clip(norms.gradient_norm, settings.clipping), 0.0)
    if scale.device.type == "cpu":
        bad, scale = bool(bad), scale.item()
    _adamw_update(fragments, settings, step, scale if settings.clipping else 1.0, bad)
    rates = Rates(settings, step, norms, rms_floor)
    signed = [f for f in fragments if rule_name(f.kind, settings) != "adamw" and f.values.numel()]
    compiled = [f for f in signed if settings.compile and not has_row_rates(f, settings)]
    _compiled_sign_update(compiled, rates, scale, bad)
    for fragment in signed:
        if not settings.compile or has_row_rates(fragment, settings):
            _sign_update(fragment, settings, rates.of(fragment), scale, bad)
    return UpdateResult(grad_norm=norms.gradient_norm.float(), skipped=~fine)


def rule_name(kind: str, settings: OptimizerConfig) -> str:
    """The update rule of parameters of this kind: tiger, lion or adamw."""
    return "adamw" if kind == "embedding" and settings.embedding == "adamw" else settings.name


def has_row_rates(fragment: Fragment, settings: OptimizerConfig) -> bool:
    """Whether each row of a parameter has its own learning rate."""
    by_rms = settings.name == "tiger" and settings.embedding_rms == "row"
    return fragment.kind == "embedding" and (by_rms or settings.embedding == "lazy")


@dataclass(frozen=True)
class Rates:
    """Learning rates and weight decays of all parameters in one update under Tiger or Lion."""

    settings: OptimizerConfig
    step: UpdateStep
    norms: TensorNorms
    rms_floor: Mapping[str, float]

    def of(self, fragment: Fragment) -> tuple[Any, float]:
        """Rate and decay of a fragment; the rate is float, 0-dim, or float64 [rows of the slice] where rows have their own."""
        rms = self.norms.row_rms.get(fragment.name, self.norms.rms.get(fragment.name, 0.0))
        rate, decay = self._scaled_by(fragment, rms, self.rms_floor[fragment.name])
        if fragment.kind == "embedding" and self.settings.embedding == "lazy":
            assert self.step.seen_V is not None, "embedding = 'lazy' needs the rows that occurred"
            first = fragment.slice_start[0]
            seen = self.step.seen_V[first : first + fragment.slice_shape[0]]
            rate = rate * seen.to(fragment.values.device, torch.float64)
        return rate, decay

    def together(self, fragments: Sequence[Fragment]) -> tuple[Tensor, list[float]]:
        """`of` for many fragments without rates per row: rates, float32 [fragments] on their device, and decays.

        A few launches for all of them: on a GPU those of each alone would take longer than the update of a small tensor.
        """
        device = fragments[0].values.device
        unscaled = [self._scaled_by(f, 1.0, 0.0) for f in fragments]
        decays = [decay for _, decay in unscaled]
        if self.settings.name != "tiger":
            return fused.to_device([rate for rate, _ in unscaled], device), decays
        floors = [self.rms_floor[f.name] if f.name in self.norms.rms else 0.0 for f in fragments]
        base, floor = fused.to_device([[rate for rate, _ in unscaled], floors], device, torch.float64)
        if device.type == "cpu":
            rms = torch.tensor([self.norms.rms.get(f.name, 1.0) for f in fragments], dtype=torch.float64)
        else:
            one = torch.ones((), device=device)
            rms = torch.stack([self.norms.rms.get(f.name, one) for f in fragments]).double()
        return (base * rms.clamp(min=floor)).float(), decays

    def _scaled_by(self, fragment: Fragment, rms: Any, floor: float) -> tuple[Any, float]:
        if self.settings.name == "tiger":
            return tiger.tiger_rate_and_decay(fragment.kind, self.step.learning_rate, rms, floor, self.settings.decay)
        return self.step.learning_rate, 0.0 if fragment.kind in ("gain", "bias") else self.settings.decay


def rate_in(block: FragmentBlock, rate: Any, dtype: torch.dtype) -> Any:
    """The rate of a block: a float, 0-dim, or [rows of the block, 1]."""
    if not isinstance(rate, Tensor):
        return rate
    return rate.to(dtype) if rate.ndim == 0 else rate[block.row : block.row + block.rows, None].to(dtype)


def allocate(fragments: list[Fragment], settings: OptimizerConfig) -> None:
    """Make the optimizer state, zeros: a momentum per parameter, a second moment only where AdamW updates it."""
    for fragment in fragments:
        fragment.momentum()
        if rule_name(fragment.kind, settings) == "adamw":
            fragment.second_moment()


def decay_momentum(fragments: list[Fragment], settings: OptimizerConfig) -> None:
    """Moments in a step that an engine left out before update_fragments: they decay by beta once, as there.

    This is what a NaN or infinite gradient does to the momentum where DeepSpeed itself leaves the step out, as under ZeRO 3
    (docs/optimizers.md lists when), and what a step left out because of its loss does under ZeRO.
    """
    for fragment in fragments:
        match rule_name(fragment.kind, settings):
            case "adamw":
                adamw.decay_moments_(
                    [fragment.momentum()], [fragment.second_moment()], _adamw_betas_and_decay(fragment, settings)[0]
                )
            case _:
                fragment.momentum().mul_(settings.coefficients[-1])


def row_mask(ids: Sequence[Tensor], vocabulary: int, mesh: Mesh) -> Tensor:
    """Rows of the embedding whose token occurred in a step: bool [vocabulary], the same on all ranks.

    Taken from the ids of all micro-batches and replicas, not from gradients: those of one micro-batch miss rows,
    and with tied weights every row has one. Tensor-parallel ranks have the same ids.
    """
    seen = torch.zeros(vocabulary, dtype=torch.uint8, device=mesh.device)
    for tokens in ids:
        seen[tokens.reshape(-1).to(mesh.device, non_blocking=True)] = 1
    return mesh.replicas.max(seen).bool()


def check_optimizer(settings: OptimizerConfig, model: ModelConfig, parallel: ParallelConfig) -> None:
    """Refuse settings that cannot work together.

    Raises:
        ValueError: one sentence with the reason and what to do.
    """
    if settings.embedding == "lazy" and model.tie_word_embeddings:
        raise ValueError(
            "optimizer.embedding = 'lazy' cannot be used with model.tie_word_embeddings = true: the softmax gives every row "
            "a gradient each step, and lazy rows would drop it; use embedding = 'plain', or untie the embeddings"
        )
    if settings.embedding_rms == "row" and rule_name("embedding", settings) != "tiger":
        mover = rule_name("embedding", settings)
        raise ValueError(f"optimizer.embedding_rms = 'row' scales Tiger's rate, but {mover} moves the embedding; remove it")
    embedding = ("embedding_learning_rate", settings.embedding_learning_rate, "embedding_weight_decay")
    pairs = (("learning_rate", settings.rate, "weight_decay", settings.decay), (*embedding, settings.embedding_weight_decay))
    for rate_key, rate, decay_key, decay in pairs:
        if rate * decay >= 1:
            raise ValueError(
                f"optimizer.{rate_key} = {rate:g} times optimizer.{decay_key} = {decay:g} is {rate * decay:g}: an update would "
                "take away all of a weight and more; make one of them smaller"
            )
    if parallel.engine == "fold":
        _check_fold(settings)


def _check_fold(settings: OptimizerConfig) -> None:
    name = rule_name("embedding", settings)
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
    """Warnings, one sentence each, about settings that work but are probably not meant."""
    warnings = []
    low, high = RELATIVE_RATES
    if settings.name == "tiger" and not low <= settings.rate <= high:
        warnings.append(
            f"optimizer.learning_rate = {settings.rate:g} looks like an absolute rate: Tiger's is relative to the RMS of each "
            f"matrix, 1e-3 to 2e-3 as published, sensible between {low:g} and {high:g}"
        )
    if settings.name != "adamw" and settings.embedding == "plain" and not model.tie_word_embeddings:
        speed = "exponentially" if settings.embedding_rms == "row" else "steadily"
        warnings.append(
            f"an untied embedding with optimizer.embedding = 'plain' drifts under {settings.name}: rows of tokens that stay "
            f"away move {speed} towards 1 / weight_decay (Su 2023, kexue.fm/archives/9736); use embedding = 'lazy' or 'adamw', "
            "or tie the embeddings"
        )
    return warnings


def names_with_rms(fragments: list[Fragment], settings: OptimizerConfig) -> tuple[set[str], set[str]]:
    """Names of the parameters whose RMS the update needs: of the whole tensor, and of each row."""
    if settings.name != "tiger":
        return set(), set()
    scaled = [f for f in fragments if f.kind in ("matrix", "embedding") and rule_name(f.kind, settings) == "tiger"]
    per_row = {f.name for f in scaled if f.kind == "embedding" and settings.embedding_rms == "row"}
    return {f.name for f in scaled} - per_row, per_row


def _clip(norm: Tensor, limit: float) -> Tensor:
    """Factor of the gradients; 1 without a limit (as torch.nn.utils.clip_grad_norm_)."""
    return (limit / (norm + 1e-6)).clamp(max=1.0) if limit else torch.ones_like(norm)


def _compiled_sign_update(fragments: list[Fragment], rates: Rates, scale: Any, bad: Any) -> None:
    """Tiger or Lion by one compiled pass per fragment."""
    if not fragments:
        return
    table = fused.kernel_scalars(rates.settings, *rates.together(fragments), scale, bad)
    for fragment, scalars in zip(fragments, table.unbind(), strict=True):
        fused.compiled(fused.sign_update)(fragment.values, fragment.momentum(), fragment.gradient, scalars)
        if rates.settings.non_finite == "shrink":
            tiger.shrink_(fragment.values, fragment.kind, bad)


def _sign_update(
    fragment: Fragment, settings: OptimizerConfig, rate_and_decay: tuple[Any, float], scale: Any, bad: Any
) -> None:  # fmt: skip
    """Tiger or Lion on one fragment, block by block, so that on a CPU a block stays in the cache."""
    rate, decay = rate_and_decay
    if isinstance(bad, Tensor):
        rate = torch.where(bad, 0.0, rate)
    for values, momentum, gradient, block_rate in _blocks(fragment, rate):
        usable: Tensor | None = gradient
        if isinstance(bad, Tensor):
            gradient.nan_to_num_(0.0, 0.0, 0.0)  # only the device knows whether it is bad; if so, it is scaled by 0
        elif bad:
            usable = None
        if settings.name == "lion":
            betas = (settings.coefficients[0], settings.coefficients[1])
            lion.lion_(values, momentum, usable, betas, block_rate, decay, scale)
        else:
            beta = settings.coefficients[0]
            tiger.accumulate_(momentum, usable, beta, (1.0 - beta) * scale)
            if bad is not True:
                tiger.apply_sign_(values, momentum, block_rate, decay)
        if settings.non_finite == "shrink":
            tiger.shrink_(values, fragment.kind, bad)


def _blocks(fragment: Fragment, rate: Any) -> Iterator[tuple[Tensor, Tensor, Tensor, Any]]:
    """Values, momentum, gradient and rate of a fragment in blocks of a size that suits the device."""
    values, momentum, gradient = fragment.values, fragment.momentum(), fragment.gradient
    assert gradient is not None
    limit = block_limit(values.device)
    if isinstance(rate, Tensor) and rate.ndim == 1:
        for block in fragment_blocks(fragment.offset, values.numel(), fragment.width, limit):
            yield block.of(values), block.of(momentum), block.of(gradient), rate_in(block, rate, values.dtype)
    else:
        one_rate = rate.to(values.dtype) if isinstance(rate, Tensor) else rate
        for part in zip(values.split(limit), momentum.split(limit), gradient.split(limit), strict=True):
            yield *part, one_rate


def _adamw_betas_and_decay(fragment: Fragment, settings: OptimizerConfig) -> tuple[tuple[float, float], float]:
    """Of a fragment under AdamW."""
    if settings.name != "adamw":
        return adamw.BETAS, settings.embedding_weight_decay
    decay = 0.0 if fragment.kind in ("gain", "bias") else settings.decay
    return (settings.coefficients[0], settings.coefficients[1]), decay


def _adamw_update(fragments: list[Fragment], settings: OptimizerConfig, step: UpdateStep, scale: Any, bad: Any) -> None:
    """AdamW on the fragments that it updates, those of equal decay in one call."""
    own = [f for f in fragments if rule_name(f.kind, settings) == "adamw" and f.values.numel()]
    rate = step.learning_rate
    if settings.name != "adamw":
        rate = settings.embedding_learning_rate * step.learning_rate / settings.rate  # the schedule's multiplier
    for decay in sorted({_adamw_betas_and_decay(f, settings)[1] for f in own}):
        group = [f for f in own if _adamw_betas_and_decay(f, settings)[1] == decay]
        betas = _adamw_betas_and_decay(group[0], settings)[0]
        adamw.adamw_(
            [f.values for f in group],
            [f.gradient for f in group if f.gradient is not None],
            [f.momentum() for f in group],
            [f.second_moment() for f in group],
            adamw.AdamWStep(step.number, rate, betas, decay, settings.eps),
            scale,
            bad,
        )
