"""The update rules in float64 on whole tensors: what every engine and layout is compared with."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from trainer.config import OptimizerConfig


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
        s, kind = self.settings, self.kinds[name]
        small = kind in ("gain", "bias")
        decay = 0.0 if small else s.decay
        m = self.m.setdefault(name, torch.zeros_like(p))
        if s.name == "adamw" or (kind == "embedding" and s.embedding == "adamw"):
            own = s.name != "adamw"
            b1, b2 = (0.9, 0.95) if own else s.coefficients
            v = self.v.setdefault(name, torch.zeros_like(p))
            m += (1 - b1) * (g - m)
            v += (1 - b2) * (g * g - v)
            eta = s.embedding_learning_rate * rate / s.rate if own else rate
            decay = s.embedding_weight_decay if own else decay
            direction = (m / (1 - b1**self.steps)) / ((v / (1 - b2**self.steps)).sqrt() + s.eps) + decay * p
        elif s.name == "lion":
            b1, b2 = s.coefficients
            direction, eta = (b1 * m + (1 - b1) * g).sign() + decay * p, torch.tensor(rate, dtype=p.dtype)
            m.mul_(b2).add_((1 - b2) * g)
        else:
            b = s.coefficients[0]
            m.mul_(b).add_((1 - b) * g)
            by_row = kind == "embedding" and s.embedding_rms == "row"
            rms = p.square().mean(1, keepdim=True).sqrt() if by_row else p.square().mean().sqrt()
            direction, eta = (
                m.sign() + decay * p,
                torch.tensor(0.5 * rate, dtype=p.dtype) if small else rate * rms.clamp(min=self.floors[name]),
            )
        if kind == "embedding" and s.embedding == "lazy":
            eta = eta * seen[:, None]
        if not bad:
            p -= eta * direction
        elif s.non_finite == "shrink":
            centre = 1.0 if kind == "gain" else 0.0
            p.copy_((p - centre) * 0.99 + centre)
