from __future__ import annotations

import math

import pytest
import torch

from mcl_dist.batch import TubeletBatch
from mcl_dist.distributed.process_group import ProcessGroup
from mcl_dist.training.anomalies import NonFiniteAttribution, SpikeDetector


def batch(*, motion: torch.Tensor | None = None) -> TubeletBatch:
    views = torch.zeros(3, 4, 4, 8, 8, 3, dtype=torch.uint8)
    return TubeletBatch(
        views=views,
        motion=torch.zeros(3, 1, 2, 2) if motion is None else motion,
        order=torch.zeros(3, dtype=torch.int64),
        samples=torch.tensor([5, 7, 9]),
        boxes=torch.zeros(3, 4, 4),
    )


def test_a_target_that_is_not_finite_is_blamed_alone() -> None:
    motion = torch.zeros(3, 1, 2, 2)
    motion[1, 0, 1, 1] = math.inf
    blame = NonFiniteAttribution(batch(motion=motion), torch.tensor([math.nan])).blame(ProcessGroup())
    assert blame.samples == [7]
    assert "motion target" in blame.reason


@pytest.mark.parametrize(("loss", "reason"), [(math.nan, "loss"), (1.0, "gradient")])
def test_with_sound_inputs_all_are_blamed(loss: float, reason: str) -> None:
    blame = NonFiniteAttribution(batch(), torch.tensor([0.5, loss])).blame(ProcessGroup())
    assert blame.samples == [5, 7, 9]
    assert reason in blame.reason


def test_a_leap_is_told_once_and_only_after_a_window_of_losses() -> None:
    detector = SpikeDetector(window=4, factor=3.0)
    assert [detector.limit_passed(loss) for loss in (9.0, 1.0, 1.2, 1.4)] == [None] * 4
    detector = SpikeDetector(window=4, factor=3.0)
    for loss in (1.0, 1.1, 1.2, 1.3):
        assert detector.limit_passed(loss) is None
    assert detector.limit_passed(1.4) is None  # the limit is 1.15 + 3 · 0.1
    assert detector.limit_passed(9.0) == pytest.approx(1.25 + 3 * 0.1)
    assert detector.limit_passed(9.0) is None


def test_what_stays_high_becomes_usual_and_a_detector_can_start_anew() -> None:
    detector = SpikeDetector(window=4, factor=3.0)
    for loss in (1.0, 1.1, 1.2, 1.3, 5.0, 5.1, 5.2):
        detector.limit_passed(loss)
    assert detector.limit_passed(5.3) is None
    assert detector.limit_passed(9.0) is not None
    detector.forget()
    assert detector.limit_passed(100.0) is None
