"""What changes from step to step: learning rate, momentum and loss weights (METHOD.md, sections 3 to 5)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mcl_dist.objective.objective import LossWeights, ObjectiveConfig

WARMUP_START = 0.01  # the first step's share of the base rate
FINAL_RATE = 1e-6
WARMUP_ALIGNMENT = 2.0  # the alignment's extra weight while warming up


@dataclass(frozen=True)
class Schedule:
    """Length of a run and its base rate, in steps.

    Attributes:
        base_rate: learning rate at the end of the warm-up.
        steps_per_epoch: n of METHOD.md.
        total_steps: length of the run.
        warmup_epochs: epochs of linear warm-up.
    """

    base_rate: float
    steps_per_epoch: int
    total_steps: int
    warmup_epochs: float

    def learning_rate(self, step: int) -> float:
        """Linear warm-up from a hundredth of the base rate, then a cosine towards 1e-6."""
        warmup = self.warmup_epochs * self.steps_per_epoch
        if step < warmup:
            return self.base_rate * (WARMUP_START + (1 - WARMUP_START) * step / warmup)
        progress = (step - warmup) / (self.total_steps - warmup)
        return FINAL_RATE + (self.base_rate - FINAL_RATE) * (1 + math.cos(math.pi * progress)) / 2

    def momentum(self, step: int, config: ObjectiveConfig) -> float:
        """The key encoder's momentum: constant, or on a cosine from the configured one to 1 after the last step."""
        if config.momentum_schedule == "constant":
            return config.momentum
        return 1 - (1 - config.momentum) * (1 + math.cos(math.pi * step / self.total_steps)) / 2

    def loss_weights(self, step: int, config: ObjectiveConfig) -> LossWeights:
        """The terms' weights: alignment doubled while warming up, order growing with the epoch if it takes part."""
        warming = step < self.warmup_epochs * self.steps_per_epoch
        epoch = step // self.steps_per_epoch + 1  # the first is 1, as the reference counts
        epochs = math.ceil(self.total_steps / self.steps_per_epoch)
        return LossWeights(
            intra=config.intra,
            alignment=config.alignment * (WARMUP_ALIGNMENT if warming else 1.0),
            order=epoch / epochs if config.order == "ramp" else 0.0,
        )
