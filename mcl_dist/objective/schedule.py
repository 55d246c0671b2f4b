"""Schedules of learning rate, momentum and loss weights (METHOD.md, sections 3 to 5)."""

import math
from dataclasses import dataclass

from mcl_dist.objective.objective import LossWeights, ObjectiveConfig

WARMUP_START = 0.01  # learning rate of the first step over the base rate
FINAL_RATE = 1e-6
WARMUP_ALIGNMENT = 2.0  # factor of the alignment loss during the warm-up


@dataclass(frozen=True)
class Schedule:
    """Length of a run in steps, and its base rate.

    `base_rate` is the learning rate at the end of the linear warm-up, `steps_per_epoch` is n of METHOD.md.
    """

    base_rate: float
    steps_per_epoch: int
    total_steps: int
    warmup_epochs: float

    def learning_rate(self, step: int) -> float:
        """Learning rate of a step: linear warm-up from a hundredth of the base rate, then cosine decay to 1e-6."""
        warmup = self.warmup_epochs * self.steps_per_epoch
        if step < warmup:
            return self.base_rate * (WARMUP_START + (1 - WARMUP_START) * step / warmup)
        progress = (step - warmup) / (self.total_steps - warmup)
        return FINAL_RATE + (self.base_rate - FINAL_RATE) * (1 + math.cos(math.pi * progress)) / 2

    def momentum(self, step: int, config: ObjectiveConfig) -> float:
        """Momentum of the key encoder: constant, or a cosine from the configured value to 1 after the last step."""
        if config.momentum_schedule == "constant":
            return config.momentum
        return 1 - (1 - config.momentum) * (1 + math.cos(math.pi * step / self.total_steps)) / 2

    def loss_weights(self, step: int, config: ObjectiveConfig) -> LossWeights:
        """Weights of the losses: alignment is doubled during the warm-up; order grows with the epoch if configured."""
        is_warmup = step < self.warmup_epochs * self.steps_per_epoch
        epoch = step // self.steps_per_epoch + 1  # counted from 1, as in the reference
        epochs = math.ceil(self.total_steps / self.steps_per_epoch)
        return LossWeights(
            intra=config.intra,
            alignment=config.alignment * (WARMUP_ALIGNMENT if is_warmup else 1.0),
            order=epoch / epochs if config.order == "ramp" else 0.0,
        )
