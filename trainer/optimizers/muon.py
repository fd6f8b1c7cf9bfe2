"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon; Su 2024, kexue.fm/archives/10592): orthogonalised momentum.

    m <- beta m + (1 - beta) g
    u = beta m + (1 - beta) g with Nesterov's momentum, else m
    W <- W - rate (scale msign(u) + decay W)        msign(u) = u (u^T u)^(-1/2), the nearest orthogonal matrix

It needs whole matrices: trainer/optimizers/whole.py. Without Nesterov's momentum the update depends on the gradient through m
alone, so fold accumulates in m and Muon trains with 4 bytes per parameter (Su 2021, kexue.fm/archives/8634, has the idea).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from trainer.optimizers.rule import Beta, Block, UpdateRule, average_

Polynomial = tuple[float, float, float]
"""a, b, c of x -> a x + b x^3 + c x^5, applied to the singular values."""

QUINTIC: Polynomial = (3.4445, -4.7750, 2.0315)
"""Jordan's: it lifts small singular values fastest and leaves all between about 0.7 and 1.2."""
CLASSICAL: Polynomial = (15 / 8, -10 / 8, 3 / 8)
"""Converges to 1, slowly where a singular value is small."""
_SAFETY = 1.01
"""By which Polar Express divides all but its last polynomial, for a norm that bfloat16 has rounded down."""
_POLAR: tuple[Polynomial, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)
POLAR_EXPRESS: tuple[Polynomial, ...] = tuple((a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5) for a, b, c in _POLAR)
"""Each the best after those before it (Amsel et al. 2025, arxiv.org/abs/2505.16932)."""

RMS_OF_ADAMW = 0.2
"""RMS of AdamW's updates (Liu et al. 2025, arxiv.org/abs/2502.16982; Su 2025, kexue.fm/archives/11267, has why)."""

MOST_LIKE_ADAMW, LEAST_UNMATCHED = 1e-2, 3e-3
"""Rates beyond these were probably meant for another scale: the usual cause of "Muon is worse" (kexue.fm/archives/11416)."""


class Muon(UpdateRule):
    """Muon. It moves the matrices of attention and mlp; another rule moves the rest."""

    learning_rate: float = Field(default=1e-3, gt=0, description="Peak rate; with scale = match-rms-adamw that of AdamW.")
    beta: Beta = Field(default=0.95, description="Momentum coefficient.")
    nesterov: bool = Field(default=True, description="Nesterov's momentum; fold needs false.")
    weight_decay: float = Field(default=0.1, ge=0, description="Decoupled decay, multiplied by the rate.")
    scale: Literal["match-rms-adamw", "original", "mup", "none"] = Field(
        default="match-rms-adamw",
        description="Factor of the orthogonal matrix [out, in]: 0.2 sqrt(max(out, in)), with which AdamW's rate and decay can "
        "be kept (Moonlight); sqrt(max(1, out / in)) (Jordan); sqrt(out / in) (muP); 1.",
    )
    newton_schulz: Literal["quintic", "polar-express", "classical"] = Field(
        default="quintic", description="Polynomials of the iteration (docs/optimizers.md)."
    )
    newton_schulz_steps: int = Field(default=5, gt=0, le=100, description="Iterations.")
    precision: Literal["bf16", "fp32"] | None = Field(
        default=None, description="Of the iteration and of what ranks send for it. Default: train.precision."
    )
    others: str = Field(default="adamw", description="Rule of embedding, head, gains and biases; fold needs tiger.")

    kinds: ClassVar[tuple[str, ...]] = ("matrix", "expert")
    whole: ClassVar[bool] = True
    takes_scale: ClassVar[bool] = True

    @property
    def why_not_folded(self) -> str:
        return (
            "Nesterov's momentum needs the mean gradient too (Muon with nesterov = false needs none)" if self.nesterov else ""
        )

    def scalars(self, number: int, decays: bool = True, scale: Any = 1.0) -> dict[str, Any]:
        take, nesterov = (1.0 - self.beta) * scale, float(self.nesterov)
        return {"keep": self.beta if decays else 1.0, "take": take, "nesterov": nesterov}

    @staticmethod
    def accumulate(state: dict[str, Tensor], gradient: Tensor, scalars: Mapping[str, Any]) -> None:
        average_(state["momentum"], gradient, scalars["keep"], scalars["take"])

    @staticmethod
    def direction(block: Block, scalars: Mapping[str, Any]) -> Tensor:
        momentum, keep, take = block.state["momentum"], scalars["keep"], scalars["take"]
        if not scalars["nesterov"]:
            return momentum
        if not isinstance(take, Tensor) and take == 1.0 - keep:
            return torch.lerp(block.gradient, momentum, keep)  # one pass for the usual case
        return momentum * keep + block.gradient * take

    def whole_dtype(self, own: torch.dtype) -> torch.dtype:
        return own if self.precision == "fp32" else torch.bfloat16

    def whole_directions(self, matrices: Tensor) -> Tensor:
        return orthogonalized(matrices, self.polynomials)

    def whole_scale(self, rows: int, columns: int) -> float:
        match self.scale:
            case "match-rms-adamw":
                return RMS_OF_ADAMW * math.sqrt(max(rows, columns))
            case "original":
                return math.sqrt(max(1.0, rows / columns))
            case "mup":
                return math.sqrt(rows / columns)
            case "none":
                return 1.0

    def whole_flops(self, rows: int, columns: int) -> float:
        short, long = sorted((rows, columns))
        return self.newton_schulz_steps * (4.0 * short * short * long + 2.0 * short**3)

    def remarks(self, section: str) -> list[str]:
        rate, matched = f"{section}.learning_rate = {self.learning_rate:g}", self.scale == "match-rms-adamw"
        if matched and self.learning_rate > MOST_LIKE_ADAMW:
            return [f"{rate} looks like a rate for scale = 'original': with 'match-rms-adamw' it is AdamW's, 1e-4 to 4e-3"]
        if not matched and self.learning_rate < LEAST_UNMATCHED:
            return [
                f"{rate} looks like AdamW's: with scale = '{self.scale}' it is about 0.2 sqrt(hidden_size) times that, 2e-2 as "
                "published, and weight_decay smaller by as much"
            ]
        return []

    @property
    def polynomials(self) -> Sequence[Polynomial]:
        """One for each iteration."""
        steps = self.newton_schulz_steps
        match self.newton_schulz:
            case "quintic":
                return [QUINTIC] * steps
            case "classical":
                return [CLASSICAL] * steps
            case "polar-express":
                return [*POLAR_EXPRESS, *[CLASSICAL] * steps][:steps]


def orthogonalized(matrices: Tensor, polynomials: Sequence[Polynomial], eps: float = 1e-7) -> Tensor:
    """About U V^T of matrices U S V^T [..., rows, columns], by Newton-Schulz iterations in their dtype, as torch.optim.Muon
    makes them.

    Args:
        eps: least Frobenius norm that a matrix is divided by; one of zeros stays zero.
    """
    tall = matrices.size(-2) > matrices.size(-1)
    x = (matrices.mT if tall else matrices).contiguous()
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=eps)
    for a, b, c in polynomials:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT.contiguous() if tall else x
