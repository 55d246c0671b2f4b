"""Motion regions and crops against the reference's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ks_2samp

from dataloading.sampling.tubelets import MotionRegion, draw_crop, motion_region

# Several times the reference's, so that the p-values are those of its chance and hardly of ours.
NUM_DRAWS = 25_000


def test_the_motion_region_is_exactly_the_references(golden: Path) -> None:
    with np.load(golden / "spatial_crop.npz", allow_pickle=False) as stored:
        for mean_map, (height, width, *edges, cover) in zip(stored["mean_mag"], stored["region"].tolist(), strict=True):
            region = motion_region(mean_map, int(height), int(width))

            assert list(region[:4]) == edges
            # The reference subtracts steps from 0.9, which leaves 0.7000000000000001.
            assert region.cover == pytest.approx(cover, abs=1e-12)


@pytest.mark.slow
def test_crops_are_distributed_as_the_references(golden: Path) -> None:
    with np.load(golden / "spatial_crop.npz", allow_pickle=False) as stored:
        maps, regions = stored["mean_mag"], stored["region"]
        sampled, theirs = stored["sampled_index"], stored["boxes_ijhw"]
    p_values = []
    for index, boxes in zip(sampled, theirs, strict=True):
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

    # A statistic is looked at for every map: the smallest p counts that often.
    assert (np.min(p_values, axis=0) * len(sampled) > 0.001).all(), p_values


def draw_boxes(region: MotionRegion, height: int, width: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    boxes = [
        draw_crop(rng, region, height=height, width=width, area=(0.2, 1.0), aspect=(3 / 4, 4 / 3))
        for _ in range(NUM_DRAWS)
    ]
    return np.array(boxes, dtype=float)


def statistics(boxes: np.ndarray, region: MotionRegion) -> tuple[np.ndarray, ...]:
    """Top, left, height, width, area, aspect and covered pixels of the region, of each box."""
    top, left, height, width = boxes.T
    rows = np.minimum(top + height, region.bottom) - np.maximum(top, region.top)
    columns = np.minimum(left + width, region.right) - np.maximum(left, region.left)
    covered = np.round(rows.clip(min=0) * columns.clip(min=0), 6)
    return top, left, height, width, height * width, width / height, covered
