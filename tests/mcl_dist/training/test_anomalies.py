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


def test_a_non_finite_target_is_attributed_to_its_sample() -> None:
    motion = torch.zeros(3, 1, 2, 2)
    motion[1, 0, 1, 1] = math.inf
    found = NonFiniteAttribution(batch(motion=motion), torch.tensor([math.nan])).attribute(ProcessGroup())
    assert found.samples == [7]
    assert "motion target" in found.reason


@pytest.mark.parametrize(("loss", "reason"), [(math.nan, "loss"), (1.0, "gradient")])
def test_with_finite_inputs_a_step_is_attributed_to_all_samples(loss: float, reason: str) -> None:
    found = NonFiniteAttribution(batch(), torch.tensor([0.5, loss])).attribute(ProcessGroup())
    assert found.samples == [5, 7, 9]
    assert reason in found.reason


def test_a_spike_is_detected_once_and_only_after_a_full_window() -> None:
    detector = SpikeDetector(window=4, factor=3.0)
    assert [detector.observe(loss) for loss in (9.0, 1.0, 1.2, 1.4)] == [None] * 4
    detector = SpikeDetector(window=4, factor=3.0)
    for loss in (1.0, 1.1, 1.2, 1.3):
        assert detector.observe(loss) is None
    assert detector.observe(1.4) is None  # the limit is 1.15 + 3 · 0.1
    assert detector.observe(9.0) == pytest.approx(1.25 + 3 * 0.1)
    assert detector.observe(9.0) is None


def test_losses_that_stay_high_become_normal_and_a_reset_discards_them() -> None:
    detector = SpikeDetector(window=4, factor=3.0)
    for loss in (1.0, 1.1, 1.2, 1.3, 5.0, 5.1, 5.2):
        detector.observe(loss)
    assert detector.observe(5.3) is None
    assert detector.observe(9.0) is not None
    detector.reset()
    assert detector.observe(100.0) is None


def test_a_detector_continues_from_the_state_of_another() -> None:
    detector, other = SpikeDetector(window=4, factor=3.0), SpikeDetector(window=4, factor=3.0)
    for loss in (1.0, 1.1, 1.2, 1.3, 9.0):
        detector.observe(loss)
    recent, is_high = detector.state
    other.load_state(recent, is_high=is_high)
    assert [other.observe(loss) for loss in (9.0, 1.2, 9.0)] == [detector.observe(loss) for loss in (9.0, 1.2, 9.0)]
