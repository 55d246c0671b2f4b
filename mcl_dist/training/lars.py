"""LARS: SGD whose rate follows each parameter's own size (You et al., arXiv 1708.03888)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

TRUST = 0.001  # η of the paper: how far a parameter moves for its size


class LARS(torch.optim.Optimizer):
    """Momentum SGD with a layer-wise rate η·‖w‖ / (‖g‖ + β·‖w‖).

    Biases and BatchNorm's parameters, which have one axis, take plain momentum SGD without decay, as is usual since
    the paper: their norms tell nothing of the scale that a step should have.

    Where `found_inf` is set to a tensor of 1, as the fused optimizers of PyTorch heed it, a step changes nothing.

    Args:
        parameters: each whole; a flat shard of several has no norm to follow.
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
            ValueError: for a closure, which only optimizers that evaluate the loss anew can use.
        """
        if closure is not None:
            raise ValueError("LARS takes no closure: it evaluates the loss once a step")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_one(parameter, parameter.grad, group)

    def _step_one(self, parameter: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        rate = torch.full((), group["lr"], device=parameter.device)
        if parameter.ndim > 1:
            decay = group["weight_decay"]
            size, slope = torch.linalg.vector_norm(parameter), torch.linalg.vector_norm(gradient)
            trust = TRUST * size / (slope + decay * size)
            rate = rate * torch.where((size > 0) & (slope > 0), trust, torch.ones_like(trust))
            gradient = gradient + decay * parameter
        change = rate * gradient
        if group["momentum"]:
            before = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
            change = group["momentum"] * before + change
            before.copy_(self._unless_found_inf(change, before))
        parameter.copy_(self._unless_found_inf(parameter - change, parameter))

    def _unless_found_inf(self, after: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        return after if self.found_inf is None else torch.where(self.found_inf > 0, before, after)
