"""LARS: SGD with a layer-wise learning rate (You et al., arXiv 1708.03888)."""

from collections.abc import Callable, Iterable
from typing import Any

import torch

TRUST = 0.001  # η of the paper, the trust coefficient


class LARS(torch.optim.Optimizer):
    """Momentum SGD with a layer-wise rate η·‖w‖ / (‖g‖ + β·‖w‖).

    One-dimensional parameters (biases, BatchNorm) take plain momentum SGD without weight decay, as is usual since the
    paper: their norms do not indicate the scale of a step.

    A step changes nothing where `found_inf` is a tensor of 1, as with PyTorch's fused optimizers.

    Args:
        parameters: each whole; a flat shard of several has no norm of its own.
        lr: the global rate.
        momentum: m.
        weight_decay: β.
    """

    found_inf: torch.Tensor | None = None

    def __init__(
        self, parameters: Iterable[torch.nn.Parameter], *, lr: float, momentum: float, weight_decay: float
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Raises:
            ValueError: a closure is given; only optimizers that evaluate the loss again use one.
        """
        if closure is not None:
            raise ValueError("LARS takes no closure: it evaluates the loss once per step")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        rate = torch.full((), group["lr"], device=parameter.device)
        if parameter.ndim > 1:
            decay = group["weight_decay"]
            norm, gradient_norm = torch.linalg.vector_norm(parameter), torch.linalg.vector_norm(gradient)
            trust = TRUST * norm / (gradient_norm + decay * norm)
            rate = rate * torch.where((norm > 0) & (gradient_norm > 0), trust, torch.ones_like(trust))
            gradient = gradient + decay * parameter
        change = rate * gradient
        if group["momentum"]:
            velocity = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
            change = group["momentum"] * velocity + change
            velocity.copy_(self._unless_found_inf(change, velocity))
        parameter.copy_(self._unless_found_inf(parameter - change, parameter))

    def _unless_found_inf(self, after: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        return after if self.found_inf is None else torch.where(self.found_inf > 0, before, after)
