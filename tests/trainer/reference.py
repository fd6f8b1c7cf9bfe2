"""The update rules in float64 on whole tensors: what every engine and layout is compared with."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.orthogonal import by_singular_values, polynomials
from trainer.optimizers.config import OptimizerConfig


@dataclass
class Reference:
    """Whole tensors by name, each with its kind; `step` takes the gradients of the global mean loss."""

    values: dict[str, Tensor]
    kinds: dict[str, str]
    settings: OptimizerConfig
    floors: dict[str, float]
    """Least RMS by name."""
    m: dict[str, Tensor] = field(default_factory=dict)
    v: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 0

    def step(self, gradients: dict[str, Tensor], rate: float, seen: Tensor | None = None, clip: float = 0.0) -> None:
        self.steps += 1
        norm = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
        bad = not norm.isfinite()
        for name, p in self.values.items():
            g = torch.zeros_like(p) if bad else gradients[name] * (min(1.0, clip / (norm + 1e-6)) if clip else 1.0)
            self.one(name, p, g, rate, seen, bad)

    def one(self, name: str, p: Tensor, g: Tensor, rate: float, seen: Tensor | None, bad: bool) -> None:
        kind = self.kinds[name]
        assigned = self.settings.assigned(name, kind)
        s: Any = assigned.rule
        small = kind in ("gain", "bias")
        decay = 0.0 if small else s.weight_decay
        m = self.m.setdefault(name, torch.zeros_like(p))
        eta: Any = torch.tensor(s.learning_rate * rate / self.settings.rate, dtype=p.dtype)
        match assigned.name:
            case "adamw":
                b1, b2 = s.betas
                v = self.v.setdefault(name, torch.zeros_like(p))
                m += (1 - b1) * (g - m)
                v += (1 - b2) * (g * g - v)
                direction = (m / (1 - b1**self.steps)) / ((v / (1 - b2**self.steps)).sqrt() + s.eps) + decay * p
            case "lion":
                b1, b2 = s.betas
                direction = (b1 * m + (1 - b1) * g).sign() + decay * p
                m.mul_(b2).add_((1 - b2) * g)
            case "muon":
                m.mul_(s.beta).add_((1 - s.beta) * g)
                u = s.beta * m + (1 - s.beta) * g if s.nesterov else m
                orthogonal = by_singular_values(u, polynomials(s.newton_schulz, s.newton_schulz_steps))
                rows, columns = p.shape
                scales = {
                    "match-rms-adamw": 0.2 * max(rows, columns) ** 0.5, "original": max(1.0, rows / columns) ** 0.5,
                    "mup": (rows / columns) ** 0.5, "none": 1.0,
                }  # fmt: skip
                direction = scales[s.scale] * orthogonal + decay * p
            case _:
                m.mul_(s.beta).add_((1 - s.beta) * g)
                by_row = kind == "embedding" and s.embedding_rms == "row"
                rms = p.square().mean(1, keepdim=True).sqrt() if by_row else p.square().mean().sqrt()
                direction = m.sign() + decay * p
                eta = 0.5 * eta if small else eta * rms.clamp(min=self.floors[name])
        if assigned.rows == "seen":
            assert seen is not None
            eta = eta * seen[:, None]
        if not bad:
            p -= eta * direction
        elif assigned.name == "tiger" and s.non_finite == "shrink":
            centre = 1.0 if kind == "gain" else 0.0
            p.copy_((p - centre) * 0.99 + centre)
