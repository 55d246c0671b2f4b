from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from dataloading.loader.probe_clips import clip_frames, clip_starts

STRIDE = 2


def test_clip_starts_equal_the_reference_for_every_duration(golden: Path) -> None:
    cases = json.loads((golden / "test_segments.json").read_text())
    assert cases
    for case in cases:
        starts, repeats = clip_starts(case["duration"], case["clip"], STRIDE)
        assert (starts.tolist(), repeats) == (case["offsets"], case["dup"]), case["duration"]
        assert case["duration"] * repeats == case["total"]


def test_frame_f_of_a_repeated_video_is_original_frame_ceil_f_over_repeats(golden: Path) -> None:
    for case in json.loads((golden / "test_segments.json").read_text()):
        repeated = np.array(case["offsets"])[:, None] + STRIDE * np.arange(case["clip"])
        expected = np.ceil(repeated / case["dup"]).astype(int)
        frames = clip_frames(case["duration"], case["clip"], STRIDE)
        assert np.array_equal(frames + 1, expected)
        assert frames.max() < case["duration"]
