"""What DeepSpeed steps: a network with its losses, in one module that returns one scalar."""

from __future__ import annotations

import torch
from torch import nn


class LossModule(nn.Module):
    """A network and what is to become small of it.

    Attributes:
        network: its parameters are what steps change.
        report: detached scalars of the last forward by name, of which `loss` is the one that it returned.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.report: dict[str, torch.Tensor] = {}
