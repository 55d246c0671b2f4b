"""Starts of clips have the distribution of the reference's draws."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ks_2samp

from dataloading.sampling.tubelets import draw_motion_starts, draw_uniform_starts

WINDOW = 32
NUM_CASES = 12
NUM_DRAWS = 10_000


def draws(golden: Path, kind: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Our starts and the reference's, (draws, 3), for every case."""
    with np.load(golden / "temporal_sampling.npz", allow_pickle=False) as stored:
        for case in range(NUM_CASES):
            rng = np.random.default_rng(case)
            scores, order = stored[f"{case}_clip_mag"], int(stored[f"{case}_order"])
            span = {"num_frames": int(stored[f"{case}_duration"]), "window": WINDOW, "order": order}
            ours = [
                draw_motion_starts(rng, scores, **span) if kind == "motion" else draw_uniform_starts(rng, **span)
                for _ in range(NUM_DRAWS)
            ]
            yield np.array(ours), stored[f"{case}_{kind}"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["motion", "uniform"])
def test_starts_have_the_distribution_of_the_reference(golden: Path, kind: str) -> None:
    p_values = np.array(
        [[ks_2samp(ours[:, clip], theirs[:, clip]).pvalue for clip in range(3)] for ours, theirs in draws(golden, kind)]
    )

    # Bonferroni correction: the start of a clip is tested in every case.
    assert (p_values.min(axis=0) * NUM_CASES > 0.001).all(), p_values


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["motion", "uniform"])
def test_every_start_of_the_reference_is_among_ours(golden: Path, kind: str) -> None:
    for ours, theirs in draws(golden, kind):
        assert set(theirs.ravel()) <= set(ours.ravel())
