"""Decodes and resizes the frames of a video file one at a time (METHOD.md, section 1.1)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
from av.video.reformatter import VideoReformatter

from mcl_dist.events import RefusalReason

EXTENSIONS = frozenset(
    (".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv", ".ts", ".3gp")
)
MIN_SIDE = 32  # pixels; a frame map has 7 cells per side, and flow may be half as large
MAX_PIXELS = 2**25  # of a frame, before or after resizing: 8K fits, sizes from damaged headers do not
ROUNDING = 0.02  # entries of the display matrix below this share of the largest count as zero
MIN_COMPLETE = 0.95  # share of the announced frames; containers may count hidden frames, a truncated file lacks many
DECODER_OPTIONS = {"max_pixels": str(MAX_PIXELS)}


class VideoRefusedError(Exception):
    """A video that cannot be used.

    Attributes:
        reason: `kind: what was found; what to do`, with few kinds, so that reports can count them. Manifests store it,
            so its texts are part of their bytes.
    """

    def __init__(self, kind: RefusalReason, detail: str) -> None:
        self.reason = f"{kind}: {detail}"
        super().__init__(self.reason)


class Video:
    """An open video file. Iterating yields RGB frames, uint8 (H, W, 3), all of one size, in display orientation.

    Holds only one frame of the file's own size at a time. Every frame counts as one, also at a variable frame rate.

    Attributes:
        height, width: size of the yielded frames; for a rotated video correct only from the first frame on.

    Args:
        path: the file.
        short_side: length in pixels that the shorter side is resized to, by area to shrink and cubic to enlarge;
            0 keeps the size.

    Raises:
        VideoRefusedError: the file cannot be opened, holds no video, or is too small or large; during iteration: it
            is damaged or truncated.
    """

    def __init__(self, path: Path, short_side: int) -> None:
        try:
            # A playlist named like a video must not open other files or URLs, and no oversized frame is allocated.
            self._container = av.open(str(path), options={"protocol_whitelist": "file", **DECODER_OPTIONS})
        except (av.error.FFmpegError, OSError) as error:
            raise VideoRefusedError(
                "unreadable", f"{error.strerror}; replace the file, it is no video or was cut off"
            ) from error
        try:
            self._stream = _video_stream(self._container)
            codec = self._stream.codec_context
            self._short_side = short_side
            self.height, self.width = target_size(codec.height, codec.width, short_side)
        except VideoRefusedError:
            self.close()
            raise

    def __enter__(self) -> Video:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._container.close()

    @property
    def fps(self) -> float:
        """Average frames per second, 0 if unknown."""
        return float(self._stream.average_rate or 0)

    def __iter__(self) -> Iterator[np.ndarray]:
        num_frames = 0
        matrix = np.eye(2, dtype=np.int32)
        times = []
        # One converter for all frames: `to_ndarray` creates one per frame, which costs more than decoding.
        converter = VideoReformatter()
        for frame in self._decode():
            # Only of the first frame: reading the side data of a frame creates a reference cycle.
            matrix = matrix if num_frames else display_matrix(frame)
            rgb = orient_frame(converter.reformat(frame, format="rgb24").to_ndarray(), matrix)
            if not num_frames:
                self.height, self.width = target_size(rgb.shape[0], rgb.shape[1], self._short_side)
            yield resize_frame(rgb, self.height, self.width)
            num_frames += 1
            times.append(frame.time or 0.0)
        self._check_complete(num_frames, max(times, default=0.0) - min(times, default=0.0))

    def _check_complete(self, num_frames: int, seconds: float) -> None:
        """Compare the decoded frames, or else the duration, with those that the container announces."""
        num_announced = self._stream.frames
        duration = (self._container.duration or 0) / av.time_base
        advice = "fetch the file again"
        if num_announced and num_frames < MIN_COMPLETE * num_announced:
            raise VideoRefusedError("truncated", f"{num_frames} frames of {num_announced} announced; {advice}")
        # Matroska stores no frame count, and at a variable rate the average rate does not give one.
        if not num_announced and self.fps and seconds + 1 / self.fps < MIN_COMPLETE * duration:
            raise VideoRefusedError("truncated", f"{seconds:.1f} s of {duration:.1f} s announced; {advice}")

    def _decode(self) -> Iterator[Any]:
        try:
            for packet in self._container.demux(self._stream):
                if packet.is_corrupt:
                    raise VideoRefusedError("truncated", "a packet is cut off; fetch the file again")
                yield from packet.decode()
        except av.error.FFmpegError as error:
            raise VideoRefusedError(
                "truncated", f"the decoder stopped ({error.strerror}); fetch the file again"
            ) from error


def target_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Height and width after resizing the shorter side to `short_side` (0: unchanged)."""
    if short_side:
        scale = short_side / min(height, width)
        height, width = round(height * scale), round(width * scale)
    if min(height, width) < MIN_SIDE:
        raise VideoRefusedError(
            "too small", f"{width}x{height} pixels, {MIN_SIDE} a side are needed; give a larger --short-side"
        )
    if height * width > MAX_PIXELS:
        raise VideoRefusedError("too large", f"{width}x{height} pixels, at most {MAX_PIXELS} are taken; scale it down")
    return height, width


def display_matrix(frame: Any) -> np.ndarray:
    """Display orientation of a decoded frame, (2, 2): a pixel (x, y) appears at (x, y) times it, y pointing down."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return np.eye(2, dtype=np.int32)
    # FFmpeg's libavutil/display.h: three rows of three numbers; the last column and row are perspective and offset.
    return np.frombuffer(data, dtype=np.int32).reshape(3, 3)[:2, :2]


def orient_frame(frame: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Rotate the frame by quarter turns and mirror it, as its display matrix asks for.

    Raises:
        VideoRefusedError: the matrix is another transformation.
    """
    largest = np.abs(matrix).max()
    (x_from_x, y_from_x), (x_from_y, y_from_y) = np.where(
        np.abs(matrix) > ROUNDING * largest, np.sign(matrix), 0
    ).tolist()
    is_upright = x_from_x and y_from_y and not (y_from_x or x_from_y)
    is_quarter_turn = y_from_x and x_from_y and not (x_from_x or y_from_y)
    if not (is_upright or is_quarter_turn):
        raise VideoRefusedError("turned", "it is to be shown at an angle, only quarters are known; turn it upright")
    if is_quarter_turn:
        frame, x_from_x, y_from_y = frame.swapaxes(0, 1), x_from_y, y_from_x
    return np.ascontiguousarray(frame[:: int(y_from_y), :: int(x_from_x)])


def resize_frame(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize the frame, by area to shrink and cubic to enlarge."""
    if frame.shape[:2] == (height, width):
        return frame
    interpolation = cv2.INTER_AREA if height < frame.shape[0] else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(frame, (width, height), interpolation=interpolation))


def _video_stream(container: Any) -> Any:
    if not container.streams.video:
        raise VideoRefusedError("no video stream", "the file holds sound or data alone; remove or replace it")
    stream = container.streams.video[0]
    if not stream.codec_context.height:
        raise VideoRefusedError(
            "unreadable", f"the picture's size is unknown or above {MAX_PIXELS} pixels; replace the file"
        )
    stream.codec_context.options = DECODER_OPTIONS
    # The build runs one process per core; threads of the decoder would compete for the cores.
    stream.codec_context.thread_count = 1
    return stream
