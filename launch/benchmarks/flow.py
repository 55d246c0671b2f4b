"""Cost of the flow estimators, and the agreement of their motion with the reference."""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch

from dataloading.flow.constants import ESTIMATORS, TVL1
from dataloading.flow.estimators import FlowEstimator, dual_tvl1, flow_bytes, opencv_flows
from dataloading.flow.tvl1 import tvl1_flow
from dataloading.motion import MAP_CELLS, summarise_motion
from dataloading.sampling.tubelets import MotionRegion, motion_region
from dataloading.synthetic.videos import write_synthetic
from dataloading.videos.decoder import Video, VideoRefusedError
from mcl_dist.errors import ConfigError, UserError

FLOWS_PER_GROUP = 4  # window of a frame map
GPU_BATCH = 64  # pairs
GPU_BATCHES = 8  # timed batches


@dataclass(frozen=True)
class EstimatorResult:
    """One estimator compared with the reference: OpenCV's TV-L1 at full size with its own settings.

    Attributes:
        ms_per_frame: CPU milliseconds on one thread, including grey conversion and resizing.
        cpu_ratio: the reference's CPU time over this estimator's.
        agreement: correlation of the frame maps, mean over maps and then over videos.
        box_iou: overlap of the boxes around the 4 strongest cells of a video's mean map, mean over videos.
        frames_per_second: flows per wall second on the requested device; on a GPU in batches, with frames and flow in
            its memory.
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
class _Measurement:
    cpu_seconds: float
    wall_seconds: float
    maps: list[np.ndarray]  # (G, 7, 7) per video


def measure_flow(
    folder: Path | None, groups: int, short_side: int, log: Callable[[str], None], device: str = "cpu"
) -> list[EstimatorResult]:
    """Run the reference and every estimator on the same frames on one thread, `tvl1` on the device.

    The folder holds class folders of videos, None makes synthetic ones; each gives `groups` groups of consecutive
    frames, spread evenly. The shorter side is resized to `short_side` pixels; 0 keeps the size.

    Raises:
        ConfigError: there is no such device.
        UserError: no video in the folder can be used.
    """
    _check_device(device)
    with tempfile.TemporaryDirectory(prefix="mcl-bench-") as temporary:
        if folder is None:
            write_synthetic(Path(temporary), seed=0, train_per_class=1, test_per_class=0)
        videos = _read_videos(folder or Path(temporary, "train"), groups, short_side, log)
    num_flows = sum(map(len, videos)) * FLOWS_PER_GROUP
    with _one_thread():
        log(f"reference: {num_flows} flows of {len(videos)} videos")
        reference = _measure(_reference, videos)
        results = []
        for name in ESTIMATORS:
            estimator = FlowEstimator(name, device=device)
            list(estimator.flows(videos[0][0]))  # the first call compiles
            results.append(_compare(name, _measure(partial(_estimate, estimator), videos), reference, num_flows))
            if name == TVL1 and device != "cpu":
                results[-1] = replace(results[-1], frames_per_second=_batched_frames_per_second(videos[0], device))
    return results


def _check_device(name: str) -> None:
    devices = ["cpu", "cuda", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if name not in devices or (name == "cuda" and not torch.cuda.is_available()):
        num_gpus = torch.cuda.device_count()
        available = f"there are {num_gpus} GPUs" if torch.cuda.is_available() else "PyTorch sees no GPU"
        raise ConfigError(f"--device: found {name!r}; must be cpu, cuda or cuda:N, and {available}")


def _batched_frames_per_second(groups: list[list[np.ndarray]], device: str) -> float:
    """Flows per second for batches in the device's memory."""
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
    """Mean over maps (G, 7, 7) of the cells' Pearson correlation; 1 if both maps are flat, 0 if only one is."""
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


def _read_videos(
    folder: Path, groups: int, short_side: int, log: Callable[[str], None]
) -> list[list[list[np.ndarray]]]:
    """Groups of consecutive frames from every usable video, spread evenly over it."""
    videos = []
    for file in sorted(folder.glob("*/*")):
        try:
            with Video(file, short_side) as video:
                frames = list(video)
        except VideoRefusedError as error:
            log(f"{file}: left out, {error.reason}")
            continue
        last = len(frames) - FLOWS_PER_GROUP - 1
        if last < 0:
            log(f"{file}: left out, {len(frames)} frames are too few")
            continue
        starts = np.linspace(0, last, min(groups, (len(frames) - 1) // FLOWS_PER_GROUP)).round().astype(int)
        videos.append([frames[start : start + FLOWS_PER_GROUP + 1] for start in starts])
    if not videos:
        raise UserError(f"{folder}: no usable video in its folders; give a folder of class folders of videos")
    return videos


def _measure(
    estimate: Callable[[list[list[np.ndarray]]], list[np.ndarray]], videos: Sequence[list[list[np.ndarray]]]
) -> _Measurement:
    start, wall_start = time.process_time(), time.perf_counter()
    flows = [estimate(groups) for groups in videos]
    seconds, wall_seconds = time.process_time() - start, time.perf_counter() - wall_start
    return _Measurement(seconds, wall_seconds, [_maps(each) for each in flows])


def _maps(flows: list[np.ndarray]) -> np.ndarray:
    groups = (flows[start : start + FLOWS_PER_GROUP] for start in range(0, len(flows), FLOWS_PER_GROUP))
    maps = [summarise_motion(group, FLOWS_PER_GROUP, FLOWS_PER_GROUP).frame_maps()[0] for group in groups]
    return np.asarray(maps, dtype=np.float64)


def _reference(groups: list[list[np.ndarray]]) -> list[np.ndarray]:
    algorithm = dual_tvl1()
    grey = [[cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in group] for group in groups]
    return [flow_bytes(flow) for group in grey for flow in opencv_flows(algorithm, group)]


def _estimate(estimator: FlowEstimator, groups: list[list[np.ndarray]]) -> list[np.ndarray]:
    return [flow for group in groups for flow in estimator.flows(group)]


def _compare(name: str, measured: _Measurement, reference: _Measurement, num_flows: int) -> EstimatorResult:
    pairs = list(zip(measured.maps, reference.maps, strict=True))
    return EstimatorResult(
        name=name,
        ms_per_frame=1000 * measured.cpu_seconds / num_flows,
        cpu_ratio=reference.cpu_seconds / measured.cpu_seconds,
        agreement=float(np.mean([map_correlation(ours, theirs) for ours, theirs in pairs])),
        box_iou=float(np.mean([box_overlap(ours.mean(axis=0), theirs.mean(axis=0)) for ours, theirs in pairs])),
        reference_ms_per_frame=1000 * reference.cpu_seconds / num_flows,
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
