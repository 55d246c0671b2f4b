from __future__ import annotations

import pytest

from mcl_dist.objective.objective import LossWeights, ObjectiveConfig
from mcl_dist.objective.schedule import Schedule

SCHEDULE = Schedule(base_rate=0.02, steps_per_epoch=10, total_steps=200, warmup_epochs=5)


def test_the_rate_rises_from_a_hundredth_of_the_base_rate_and_decays_to_almost_zero() -> None:
    rates = [SCHEDULE.learning_rate(step) for step in range(200)]
    assert rates[0] == pytest.approx(0.0002)
    assert rates[50] == pytest.approx(0.02)
    assert rates[:51] == sorted(rates[:51])
    assert rates[50:] == sorted(rates[50:], reverse=True)
    assert 1e-6 < rates[-1] < 1e-5


def test_the_alignment_weight_is_doubled_during_the_warm_up() -> None:
    config = ObjectiveConfig(alignment=0.5)
    assert SCHEDULE.loss_weights(49, config) == LossWeights(intra=1.0, alignment=1.0, order=0.0)
    assert SCHEDULE.loss_weights(50, config) == LossWeights(intra=1.0, alignment=0.5, order=0.0)


def test_the_order_weight_grows_with_the_epoch_if_configured() -> None:
    config = ObjectiveConfig(order="ramp")
    assert [SCHEDULE.loss_weights(step, config).order for step in (0, 9, 10, 199)] == [0.05, 0.05, 0.1, 1]


def test_the_rate_of_a_run_shorter_than_its_warm_up_only_rises() -> None:
    short = Schedule(base_rate=1.0, steps_per_epoch=10, total_steps=20, warmup_epochs=5)
    rates = [short.learning_rate(step) for step in range(20)]
    assert rates == sorted(rates)


def test_the_momentum_is_constant_or_rises_to_one() -> None:
    assert {SCHEDULE.momentum(step, ObjectiveConfig(momentum=0.99)) for step in range(200)} == {0.99}
    config = ObjectiveConfig(momentum=0.99, momentum_schedule="cosine")
    momenta = [SCHEDULE.momentum(step, config) for step in range(201)]
    assert momenta == sorted(momenta)
    assert (momenta[0], momenta[100], momenta[200]) == pytest.approx((0.99, 0.995, 1.0))
