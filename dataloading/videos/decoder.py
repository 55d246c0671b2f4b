"""Frames of a video file, decoded and resized one at a time (METHOD.md, section 1.1)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
from av.video.reformatter import VideoReformatter

EXTENSIONS = frozenset(
    (".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv", ".ts", ".3gp")
)
SMALLEST_SIDE = 32  # a motion map has 7 cells a side and flow may be half as large
MAX_PIXELS = 2**25  # of a frame, before or after resizing: 8K fits, and what a damaged header claims does not
STRAIGHT = 0.02  # of the display matrix's largest number; what is smaller is rounding
WHOLE = 0.95  # containers may announce a few frames that nobody is meant to see; a cut-off file lacks many
DECODER_OPTIONS = {"max_pixels": str(MAX_PIXELS)}


class VideoRefusedError(Exception):
    """A video that cannot be used.

    Attributes:
        reason: `kind: what was found; what to do`, where few kinds exist so that they can be counted.
    """

    def __init__(self, kind: str, detail: str) -> None:
        self.reason = f"{kind}: {detail}"
        super().__init__(self.reason)


class Video:
    """An open video file; iterating it gives RGB frames, uint8 (H, W, 3), all of one size, as they are to be shown.

    Only one frame of the file's own size is held at a time. A variable frame rate changes nothing: every frame
    counts as one.

    Attributes:
        height, width: of the frames given out; of a video that is shown turned they are known with its first frame.

    Args:
        path: the file.
        short_side: pixels that the shorter side is resized to, by area when shrinking and cubic when
            growing; 0 keeps the size.

    Raises:
        VideoRefusedError: here when the file cannot be opened, holds no video or is too small or large; while
            iterating when it is damaged or ends early.
    """

    def __init__(self, path: Path, short_side: int) -> None:
        try:
            # What a playlist in a video's clothes names is not opened, and no frame is made room for that is too large.
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
        """Frames per second on average, 0 when the file does not say."""
        return float(self._stream.average_rate or 0)

    def __iter__(self) -> Iterator[np.ndarray]:
        num_frames = 0
        matrix = np.eye(2, dtype=np.int32)
        times = []
        # One converter for all frames: `to_ndarray` would set up a new one for each, which costs more than decoding.
        converter = VideoReformatter()
        for frame in self._decoded():
            # Of the first frame alone: a frame that was asked for its side data holds on to itself.
            matrix = matrix if num_frames else display_matrix(frame)
            rgb = as_shown(converter.reformat(frame, format="rgb24").to_ndarray(), matrix)
            if not num_frames:
                self.height, self.width = target_size(rgb.shape[0], rgb.shape[1], self._short_side)
            yield resized(rgb, self.height, self.width)
            num_frames += 1
            times.append(frame.time or 0.0)
        self._check_whole(num_frames, max(times, default=0.0) - min(times, default=0.0))

    def _check_whole(self, num_frames: int, seconds: float) -> None:
        """Compare what was decoded with what the container announced: frames, or else a duration."""
        num_announced = self._stream.frames
        duration = (self._container.duration or 0) / av.time_base
        advice = "fetch the file again"
        if num_announced and num_frames < WHOLE * num_announced:
            raise VideoRefusedError("truncated", f"{num_frames} frames of {num_announced} announced; {advice}")
        # Matroska counts no frames, and an average rate says little of a video whose rate varies.
        if not num_announced and self.fps and seconds + 1 / self.fps < WHOLE * duration:
            raise VideoRefusedError("truncated", f"{seconds:.1f} s of {duration:.1f} s announced; {advice}")

    def _decoded(self) -> Iterator[Any]:
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
    """Height and width after resizing the shorter side to `short_side` (0: as they are)."""
    if short_side:
        scale = short_side / min(height, width)
        height, width = round(height * scale), round(width * scale)
    if min(height, width) < SMALLEST_SIDE:
        raise VideoRefusedError(
            "too small", f"{width}x{height} pixels, {SMALLEST_SIDE} a side are needed; give a larger --short-side"
        )
    if height * width > MAX_PIXELS:
        raise VideoRefusedError("too large", f"{width}x{height} pixels, at most {MAX_PIXELS} are taken; scale it down")
    return height, width


def display_matrix(frame: Any) -> np.ndarray:
    """How a decoded frame says that it is to be shown: (x, y) of a pixel times this (2, 2), y pointing down."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return np.eye(2, dtype=np.int32)
    # FFmpeg's libavutil/display.h: three rows of three numbers, the last column and row for perspective and place.
    return np.frombuffer(data, dtype=np.int32).reshape(3, 3)[:2, :2]


def as_shown(frame: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """The frame turned by quarters and mirrored, as a phone's video says that it is to be shown.

    Raises:
        VideoRefusedError: the matrix does something else.
    """
    largest = np.abs(matrix).max()
    (along, across), (back, down) = np.where(np.abs(matrix) > STRAIGHT * largest, np.sign(matrix), 0).tolist()
    is_upright = along and down and not (across or back)
    is_quarter = across and back and not (along or down)
    if not (is_upright or is_quarter):
        raise VideoRefusedError("turned", "it is to be shown at an angle, only quarters are known; turn it upright")
    if is_quarter:
        frame, along, down = frame.swapaxes(0, 1), back, across
    return np.ascontiguousarray(frame[:: int(down), :: int(along)])


def resized(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """The frame at that size: by area when shrinking, cubic when growing."""
    if frame.shape[:2] == (height, width):
        return frame
    way = cv2.INTER_AREA if height < frame.shape[0] else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(frame, (width, height), interpolation=way))


def _video_stream(container: Any) -> Any:
    if not container.streams.video:
        raise VideoRefusedError("no video stream", "the file holds sound or data alone; remove or replace it")
    stream = container.streams.video[0]
    if not stream.codec_context.height:
        raise VideoRefusedError(
            "unreadable", f"the picture's size is unknown or above {MAX_PIXELS} pixels; replace the file"
        )
    stream.codec_context.options = DECODER_OPTIONS
    # The build runs one process a core: threads of a decoder would only fight over them.
    stream.codec_context.thread_count = 1
    return stream
