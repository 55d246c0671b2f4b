"""Configuration of TV-L1, for the CPU's kernels and for the batched form on a GPU."""

from dataclasses import dataclass
from functools import cached_property

SMALLEST_SIDE = 16  # of a scale of the pyramid, as in OpenCV
MEDIAN_EVERY = 30  # steps, as in OpenCV
FLAT = 1.1920929e-7  # squared image gradient below which the data term ignores the flow, as in OpenCV


@dataclass(frozen=True)
class TVL1Config:
    """The energy and the accuracy of its minimum: OpenCV's defaults, except for fewer steps after a warp than its 300.

    docs/reference/benchmarks.md has the reasons for these numbers of steps, and their cost in agreement with OpenCV.

    Attributes:
        attachment: λ, weight of the data term; grey levels are in 0 to 255.
        tightness: θ, coupling of the two parts of the split energy.
        time_step: τ of the dual's descent.
        scales: of the pyramid, including the frame's own size.
        scale_step: size of a scale relative to the next larger one.
        warps: at every scale.
        first_steps: at most, after the first warp of a scale.
        steps: at most, after any other warp.
        tolerance: a warp's steps end when the root mean square of a step's change of the flow, in pixels, is below it.
    """

    attachment: float = 0.15
    tightness: float = 0.3
    time_step: float = 0.25
    scales: int = 5
    scale_step: float = 0.8
    warps: int = 5
    first_steps: int = 20
    steps: int = 8
    tolerance: float = 0.01

    @cached_property
    def max_steps(self) -> list[int]:
        """Largest number of steps after each warp."""
        return [self.first_steps] + [self.steps] * (self.warps - 1)
