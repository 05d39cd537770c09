"""Muon for the matrices, AdamW for embeddings and norms, as one small optimiser."""

import torch
from torch import Tensor, nn

#: quintic Newton-Schulz coefficients of Muon (K. Jordan et al., 2024)
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonal(stack: Tensor, steps: int = 5) -> Tensor:
    """Nearest half-orthogonal matrices, roughly; stack: [count, rows, columns]."""
    a, b, c = COEFFICIENTS
    flip = stack.shape[1] > stack.shape[2]
    x = stack.transpose(1, 2) if flip else stack
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.transpose(1, 2) if flip else x


class Optimizer:
    """Muon on 2-D weights of layers, AdamW on the rest; ``step(scale)`` scales both rates."""

    def __init__(self, model: nn.Module, muon: float = 0.02, adam: float = 3e-3, decay: float = 0.02):
        self.rates, self.decay, self.count = (muon, adam), decay, 0
        named = list(model.named_parameters())
        matrices = [(n, p) for n, p in named if p.ndim == 2 and "embed" not in n]
        self.groups: dict[tuple[int, ...], list[Tensor]] = {}
        for _, p in matrices:
            self.groups.setdefault(tuple(p.shape), []).append(p)
        self.momentum = {k: torch.zeros(len(v), *k) for k, v in self.groups.items()}
        self.rest = [p for n, p in named if p.ndim != 2 or "embed" in n]
        self.first = [torch.zeros_like(p) for p in self.rest]
        self.second = [torch.zeros_like(p) for p in self.rest]

    @torch.no_grad()
    def step(self, scale: float) -> None:
        self.count += 1
        muon, adam = (r * scale for r in self.rates)
        beta = min(0.95, 0.85 + 0.1 * self.count / 300)
        for shape, params in self.groups.items():
            grad = torch.stack([p.grad for p in params])
            speed = self.momentum[shape].lerp_(grad, 1 - beta)
            update = orthogonal(grad.lerp(speed, beta), 5)
            factor = max(1.0, shape[0] / shape[1]) ** 0.5
            for p, u in zip(params, update, strict=True):
                p.mul_(1 - muon * self.decay).add_(u, alpha=-muon * factor)
        low, high = 0.9, 0.98
        for p, m, v in zip(self.rest, self.first, self.second, strict=True):
            m.lerp_(p.grad, 1 - low)
            v.lerp_(p.grad.square(), 1 - high)
            rate = adam / (1 - low**self.count)
            p.addcdiv_(m, (v / (1 - high**self.count)).sqrt_().add_(1e-8), value=-rate)

    def state(self) -> dict:
        return {"momentum": self.momentum, "first": self.first, "second": self.second, "count": self.count}

    def load(self, state: dict) -> None:
        self.momentum, self.first = state["momentum"], state["first"]
        self.second, self.count = state["second"], state["count"]
