"""Base of the modules that the engine optimises."""

import torch
from torch import nn


class LossModule(nn.Module):
    """A network and the loss to minimise; the forward returns the loss as one scalar.

    Attributes:
        network: its parameters are optimised.
        report: detached scalars of the last forward by name, including `loss`, the one that it returned.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.report: dict[str, torch.Tensor] = {}
