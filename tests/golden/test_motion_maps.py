from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dataloading.motion import motion_target, summarise_motion


@pytest.fixture(scope="module")
def vectors(golden: Path) -> dict[str, np.ndarray]:
    with np.load(golden / "motion_maps.npz", allow_pickle=False) as arrays:
        return dict(arrays)


@pytest.mark.parametrize(("window", "name"), [(4, "frame_mag_kinetics"), (8, "frame_mag_ucf101")])
def test_frame_maps_equal_the_reference(vectors: dict[str, np.ndarray], window: int, name: str) -> None:
    maps = summarise_motion(vectors["flow_u8"], map_window=window, clip_window=32).frame_maps()
    difference = np.abs(maps.astype(int) - vectors[name])
    assert maps.dtype == np.uint8
    assert difference.max() <= 1
    assert np.count_nonzero(difference) <= difference.size / 200


def test_clip_scores_equal_the_reference(vectors: dict[str, np.ndarray]) -> None:
    scores = summarise_motion(vectors["flow_u8"], map_window=4, clip_window=32).clip_scores()
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, vectors["clip_mag"], rtol=1e-4)


def test_motion_targets_equal_the_reference(vectors: dict[str, np.ndarray]) -> None:
    target = motion_target(torch.from_numpy(vectors["st_flow_u8"])[None], vectors["st_motion"].shape)
    assert target.dtype == torch.float32
    np.testing.assert_allclose(target[0].numpy(), vectors["st_motion"], rtol=1e-4)
