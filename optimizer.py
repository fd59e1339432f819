"""What moves the weights: Adam or Muon, the learning rate of a step, and the averaged weights (EMA)."""
import math

import torch
from torch import Tensor, nn


class Muon(torch.optim.AdamW):
    """AdamW, but matrices and kernels of 8 x 8 and more step along their orthogonalised momentum (Jordan et
    al. 2024), of root mean square lr / 2. torch.optim.Muon takes no kernels, and is in bf16.
    """
    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step; takes the gradients of what it has moved."""
        for group in self.param_groups:
            alike: dict[tuple, list[Tensor]] = {}  # those of one shape turn together: few kernels on a GPU
            for parameter in group["params"]:
                if parameter.grad is None or parameter.ndim < 2 or min(parameter.shape[:2]) < 8:
                    continue
                alike.setdefault(parameter.shape, []).append(parameter)
            for parameters in alike.values():
                self.turn(parameters, group["lr"], group["weight_decay"])
        super().step()

    def turn(self, parameters: list[Tensor], lr: float, decay: float) -> None:
        """Moves matrices or kernels of one shape."""
        gradients, momenta = [], []
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            momenta.append(state["momentum"])
            gradients.append(parameter.grad)
            parameter.grad = None
        torch._foreach_lerp_(momenta, gradients, 0.05)
        ahead = torch._foreach_lerp(momenta, gradients, 0.05)  # Nesterov's
        matrices = torch.stack(ahead).flatten(2)
        length = 0.5 * lr * max(matrices.shape[1:]) ** 0.5
        steps = orthogonal(matrices).view(-1, *parameters[0].shape)
        torch._foreach_mul_(parameters, 1 - lr * decay)
        torch._foreach_add_(parameters, list(steps), alpha=-length)


def orthogonal(matrices: Tensor) -> Tensor:
    """The matrices (n, rows, columns) with singular values near 1, by five Newton-Schulz iterations."""
    _, rows, columns = matrices.shape
    if rows > columns:
        return orthogonal(matrices.mT).mT
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    if 2 * rows <= columns:
        return iterated(x @ x.mT) @ x
    for _ in range(5):
        x = torch.baddbmm(x, polynomial(x @ x.mT), x, beta=3.4445)
    return x


def polynomial(square: Tensor) -> Tensor:
    """-4.775 s + 2.0315 s² of s = x @ x.mT. The iteration's constant, 3.4445, is added where it is used."""
    return torch.baddbmm(square, square, square, beta=-4.775, alpha=2.0315)


def iterated(square: Tensor) -> Tensor:
    """The product of the five iterations' polynomials, all of x @ x.mT: for long x a third of the work."""
    product = torch.eye(square.shape[-1], device=square.device).expand_as(square)
    for _ in range(5):
        p = polynomial(square)
        product = torch.baddbmm(product, p, product, beta=3.4445)
        square = torch.baddbmm(square, p, square, beta=3.4445)
        square = torch.baddbmm(square, square, p, beta=3.4445)
    return product


def make_optimizer(kind: str, model: nn.Module, lr: float, beta2: float,
                   weight_decay: float) -> torch.optim.Optimizer:
    """The optimizer "adam" or "muon" of the model's parameters as they are now."""
    cls = Muon if kind == "muon" else torch.optim.AdamW
    return cls(model.parameters(), lr=lr, betas=(0.9, beta2), weight_decay=weight_decay, fused=True)


def lr_factor(step: int, warmup: int, decay: str, steps: int) -> float:
    """The learning rate of a step over --lr: linear warm-up, then constant, half a cosine down to 0, or
    constant for half of all steps and then a line down to 0.
    """
    warm = min(1.0, (step + 1) / max(1, warmup))
    if decay == "constant":
        return warm
    if decay == "linear":
        return min(warm, 2 * (1 - step / steps))
    return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))


@torch.no_grad()
def ema_update(averaged: nn.Module, model: nn.Module, step: int, decay: float) -> None:
    """Moves the averaged weights (EMA) towards the model's after a step: at step 0 all the way, then by
    1 - decay, but with a decay of (1 + step) / (10 + step) while that is less: for 0.999 for 9,000 steps.
    """
    now = min(decay, (1 + step) / (10 + step))
    if step == 0:
        now = 0.0
    torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - now)
