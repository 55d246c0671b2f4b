"""What the flow estimators cost, and how well their motion agrees with the full reference's."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch

from dataloading.flow.estimators import ESTIMATORS, TVL1, FlowEstimator, dual_tvl1, flow_bytes, opencv_flows
from dataloading.flow.tvl1 import tvl1_flow
from dataloading.motion import MAP_CELLS, summarise_motion
from dataloading.sampling.tubelets import MotionRegion, motion_region
from dataloading.videos.decoder import Video, VideoRefusedError
from mcl_dist.errors import UserError

FLOWS_PER_GROUP = 4  # the window of a frame map
GPU_BATCH = 64  # pairs
GPU_BATCHES = 8  # timed


@dataclass(frozen=True)
class EstimatorResult:
    """One estimator against OpenCV's TV-L1 at full size with its own settings.

    Attributes:
        name: of the estimator.
        ms_per_frame: CPU milliseconds, grey conversion and resizing included; one thread.
        cpu_ratio: the reference's CPU time over this one's.
        agreement: correlation of the frame maps, the mean over maps and then over videos.
        box_iou: of the boxes around the strongest 4 cells of a video's mean map, the mean over videos.
        reference_ms_per_frame: the reference's.
        videos: looked at.
        flows: looked at.
        frames_per_second: flows a wall second on the device asked for; on a GPU in batches, frames and flow there.
    """

    name: str
    ms_per_frame: float
    cpu_ratio: float
    agreement: float
    box_iou: float
    reference_ms_per_frame: float
    videos: int
    flows: int
    frames_per_second: float


@dataclass
class _Measured:
    seconds: float  # of the processor
    wall_seconds: float
    maps: list[np.ndarray]  # (G, 7, 7) a video


def benchmark(
    folder: Path, groups: int, short_side: int, say: Callable[[str], None], device: str = "cpu"
) -> list[EstimatorResult]:
    """Run the reference and every estimator on the same frames, on one thread; `tvl1` on the device.

    Raises:
        UserError: no video in the folder can be used.
    """
    videos = _videos(folder, groups, short_side, say)
    num_flows = sum(len(groups_of) for groups_of in videos) * FLOWS_PER_GROUP
    with _one_thread():
        say(f"reference: {num_flows} flows of {len(videos)} videos")
        reference = _measure(_reference, videos)
        results = []
        for name in ESTIMATORS:
            estimator = FlowEstimator(name, device=device)
            list(estimator.flows(videos[0][0]))  # what is compiled at the first call is no flow's cost
            results.append(_compare(name, _measure(_whole_groups(estimator), videos), reference, num_flows))
            if name == TVL1 and device != "cpu":
                results[-1] = replace(results[-1], frames_per_second=_batched_speed(videos[0], device))
    return results


def _batched_speed(groups: list[list[np.ndarray]], device: str) -> float:
    """Flows a second of batches that lie on the device."""
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for group in groups for frame in group]
    frames = torch.from_numpy(np.stack(grey)).to(device)
    frames = frames.repeat(-(-GPU_BATCH // len(frames)) + 1, 1, 1)[: GPU_BATCH + 1]
    for batches in (1, GPU_BATCHES):  # the first compiles
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(batches):
            tvl1_flow(frames[:-1], frames[1:])
        torch.cuda.synchronize(device)
    return GPU_BATCH * GPU_BATCHES / (time.perf_counter() - start)


def map_correlation(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Mean over maps (G, 7, 7) of Pearson's correlation of their cells; 1 where neither, 0 where one alone is flat."""
    values = []
    for one, other in zip(ours, theirs, strict=True):
        a, b = one.ravel() - one.mean(), other.ravel() - other.mean()
        length = float(np.linalg.norm(a) * np.linalg.norm(b))
        values.append(float(a @ b) / length if length else float(not a.any() and not b.any()))
    return float(np.mean(values))


def box_overlap(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Intersection over union of the motion regions of two (7, 7) maps."""
    one, other = (motion_region(each, MAP_CELLS, MAP_CELLS) for each in (ours, theirs))
    across = min(one.right, other.right) - max(one.left, other.left)
    down = min(one.bottom, other.bottom) - max(one.top, other.top)
    shared = max(across, 0.0) * max(down, 0.0)
    return shared / (_area(one) + _area(other) - shared)


def _area(region: MotionRegion) -> float:
    return (region.bottom - region.top) * (region.right - region.left)


def _videos(folder: Path, groups: int, short_side: int, say: Callable[[str], None]) -> list[list[list[np.ndarray]]]:
    """Of every usable video, groups of consecutive frames spread evenly over it."""
    videos = []
    for file in sorted(folder.glob("*/*")):
        try:
            with Video(file, short_side) as video:
                frames = list(video)
        except VideoRefusedError as error:
            say(f"{file}: left out, {error.reason}")
            continue
        last = len(frames) - FLOWS_PER_GROUP - 1
        if last < 0:
            say(f"{file}: left out, {len(frames)} frames are too few")
            continue
        starts = np.linspace(0, last, min(groups, (len(frames) - 1) // FLOWS_PER_GROUP)).round().astype(int)
        videos.append([frames[start : start + FLOWS_PER_GROUP + 1] for start in starts])
    if not videos:
        raise UserError(f"{folder}: no usable video in its folders; give a folder of class folders of videos")
    return videos


def _measure(
    estimate: Callable[[list[list[np.ndarray]]], list[np.ndarray]], videos: Sequence[list[list[np.ndarray]]]
) -> _Measured:
    start, wall_start = time.process_time(), time.perf_counter()
    flows = [estimate(groups) for groups in videos]
    seconds, wall_seconds = time.process_time() - start, time.perf_counter() - wall_start
    return _Measured(seconds, wall_seconds, [_maps(each) for each in flows])


def _maps(flows: list[np.ndarray]) -> np.ndarray:
    groups = (flows[start : start + FLOWS_PER_GROUP] for start in range(0, len(flows), FLOWS_PER_GROUP))
    maps = [summarise_motion(group, FLOWS_PER_GROUP, FLOWS_PER_GROUP).frame_maps()[0] for group in groups]
    return np.asarray(maps, dtype=np.float64)


def _reference(groups: list[list[np.ndarray]]) -> list[np.ndarray]:
    algorithm = dual_tvl1()
    grey = [[cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in group] for group in groups]
    return [flow_bytes(flow) for group in grey for flow in opencv_flows(algorithm, group)]


def _whole_groups(estimator: FlowEstimator) -> Callable[[list[list[np.ndarray]]], list[np.ndarray]]:
    def estimate(groups: list[list[np.ndarray]]) -> list[np.ndarray]:
        return [flow for group in groups for flow in estimator.flows(group)]

    return estimate


def _compare(name: str, measured: _Measured, reference: _Measured, num_flows: int) -> EstimatorResult:
    pairs = list(zip(measured.maps, reference.maps, strict=True))
    return EstimatorResult(
        name=name,
        ms_per_frame=1000 * measured.seconds / num_flows,
        cpu_ratio=reference.seconds / measured.seconds,
        agreement=float(np.mean([map_correlation(ours, theirs) for ours, theirs in pairs])),
        box_iou=float(np.mean([box_overlap(ours.mean(axis=0), theirs.mean(axis=0)) for ours, theirs in pairs])),
        reference_ms_per_frame=1000 * reference.seconds / num_flows,
        videos=len(pairs),
        flows=num_flows,
        frames_per_second=num_flows / measured.wall_seconds,
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    before = cv2.getNumThreads(), torch.get_num_threads()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before[0])
        torch.set_num_threads(before[1])
