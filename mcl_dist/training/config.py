"""Size and length of a run, and its response to anomalies."""

from dataclasses import dataclass

from mcl_dist.config import choice, number
from mcl_dist.errors import ConfigError


@dataclass(frozen=True)
class TrainConfig:
    """Size and length of a run.

    Attributes:
        global_batch: videos per step, over all ranks.
        accumulate: gradient accumulation: number of parts into which a rank's videos of a step are split. Memory is
            that of one part, the gradient that of all. BatchNorm normalises each part by itself.
        epochs: length of the run in passes over the training set.
        steps: length of the run in steps; overrides `epochs`.
        precision: of the encoders' forward and backward; losses and cosines are always float32.
        compile: compile the encoders with torch.compile, which takes a minute or two at the start.
        max_nonfinite_steps: the run fails after this many consecutive steps without a finite loss and gradient;
            fewer are skipped.
        on_spike: response to a loss spike: `ignore`, `warn`, or `rollback` to the newest checkpoint. A rollback
            continues with the next videos, because the same videos would lead to the same spike.
        spike_window: number of recent losses from which the limit is computed.
        spike_factor: a loss is a spike when it exceeds their median by this many median absolute deviations.
    """

    global_batch: int = number(32, minimum=1)
    accumulate: int = number(1, minimum=1)
    epochs: int = number(400, minimum=1)
    steps: int | None = number(None, minimum=1)
    precision: str = choice("float32", "bfloat16")
    compile: bool = False
    max_nonfinite_steps: int = number(10, minimum=1)
    on_spike: str = choice("warn", "ignore", "rollback")
    spike_window: int = number(100, minimum=4)
    spike_factor: float = number(20.0, minimum=1)

    def batch_per_rank(self, num_ranks: int) -> int:
        """Videos per step on one rank.

        Raises:
            ConfigError: the global batch is not divisible by the ranks, or by the ranks times `accumulate`.
        """
        for count, what in ((num_ranks, "ranks"), (num_ranks * self.accumulate, "ranks x train.accumulate")):
            if self.global_batch % count:
                raise ConfigError(
                    f"train.global_batch: {self.global_batch} is not divisible by {count} {what}; "
                    f"set it to a multiple of {count}"
                )
        return self.global_batch // num_ranks
