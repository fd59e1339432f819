"""What moves the weights: Adam or Muon, the learning rate of a step, and the averaged weights (EMA)."""
import math

import torch
from torch import Tensor, nn


class Muon(torch.optim.AdamW):
    """AdamW, but matrices and kernels of 8 x 8 and more step along their orthogonalised momentum (Jordan et
    al. 2024), half as long as lr in root mean square. torch.optim.Muon takes no kernels, and computes in bf16.
    """
    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step; takes the gradients of what it has moved."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None or parameter.ndim < 2 or min(parameter.shape[:2]) < 8:
                    continue
                self.turn(parameter, group["lr"], group["weight_decay"])
                parameter.grad = None
        super().step()

    def turn(self, parameter: Tensor, lr: float, decay: float) -> None:
        """Moves one matrix or kernel."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)  # AdamW wants everybody to have one when it is loaded
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"].lerp_(parameter.grad, 0.05)
        ahead = momentum.lerp(parameter.grad, 0.05).flatten(1)  # Nesterov's
        length = 0.5 * lr * max(ahead.shape) ** 0.5
        parameter.mul_(1 - lr * decay)
        parameter.add_(orthogonal(ahead).view_as(parameter), alpha=-length)


def orthogonal(matrix: Tensor) -> Tensor:
    """The matrix with its singular values brought near 1, by five Newton-Schulz iterations."""
    x = matrix / (matrix.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    if 2 * x.shape[0] <= x.shape[1]:
        x = iterated(x @ x.T) @ x
    else:
        for _ in range(5):
            square = x @ x.T
            x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    return x.T if tall else x


def iterated(square: Tensor) -> Tensor:
    """The product of the five iterations' polynomials, all of x @ x.T: for long x a third of the work."""
    one = torch.eye(len(square), device=square.device)
    product = one
    for _ in range(5):
        polynomial = 3.4445 * one - 4.775 * square + 2.0315 * square @ square
        product = polynomial @ product
        square = polynomial @ square @ polynomial
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
    """Moves the averaged weights (EMA) towards the model's after a step: decay, less in the first few
    thousand steps, and at step 0 all the way.
    """
    now = min(decay, (1 + step) / (10 + step))
    if step == 0:
        now = 0.0
    torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - now)
