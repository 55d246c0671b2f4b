"""Motion regions equal the reference's, and crops have the same distribution."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ks_2samp

from dataloading.sampling.tubelets import MotionRegion, draw_crop, motion_region

# Several times the reference's number, so that its sampling error dominates the p-values.
NUM_DRAWS = 25_000


def test_motion_regions_equal_the_reference_exactly(golden: Path) -> None:
    with np.load(golden / "spatial_crop.npz", allow_pickle=False) as stored:
        for mean_map, (height, width, *edges, cover) in zip(stored["mean_mag"], stored["region"].tolist(), strict=True):
            region = motion_region(mean_map, int(height), int(width))

            assert list(region[:4]) == edges
            # The reference subtracts steps from 0.9 and gets 0.7000000000000001.
            assert region.cover == pytest.approx(cover, abs=1e-12)


@pytest.mark.slow
def test_crops_have_the_distribution_of_the_reference(golden: Path) -> None:
    with np.load(golden / "spatial_crop.npz", allow_pickle=False) as stored:
        maps, regions = stored["mean_mag"], stored["region"]
        sampled, expected = stored["sampled_index"], stored["boxes_ijhw"]
    p_values = []
    for index, boxes in zip(sampled, expected, strict=True):
        height, width = (int(side) for side in regions[index, :2])
        region = motion_region(maps[index], height, width)
        ours = draw_boxes(region, height, width, seed=int(index))
        p_values.append(
            [
                ks_2samp(mine, reference).pvalue
                for mine, reference in zip(
                    statistics(ours, region), statistics(boxes.astype(float), region), strict=True
                )
            ]
        )

    # Bonferroni correction: every statistic is tested on every map.
    assert (np.min(p_values, axis=0) * len(sampled) > 0.001).all(), p_values


def draw_boxes(region: MotionRegion, height: int, width: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    boxes = [
        draw_crop(rng, region, height=height, width=width, area=(0.2, 1.0), aspect=(3 / 4, 4 / 3))
        for _ in range(NUM_DRAWS)
    ]
    return np.array(boxes, dtype=float)


def statistics(boxes: np.ndarray, region: MotionRegion) -> tuple[np.ndarray, ...]:
    """Top, left, height, width, area, aspect ratio and number of covered pixels of the region, for each box."""
    top, left, height, width = boxes.T
    rows = np.minimum(top + height, region.bottom) - np.maximum(top, region.top)
    columns = np.minimum(left + width, region.right) - np.maximum(left, region.left)
    covered = np.round(rows.clip(min=0) * columns.clip(min=0), 6)
    return top, left, height, width, height * width, width / height, covered
