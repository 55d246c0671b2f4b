"""Unusual videos, all written by these tests: each is stored, or refused with a reason."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from dataloading.build.config import BuildConfig
from dataloading.build.video_processor import VideoProcessor
from dataloading.shards.format import RefusedVideo, Sample
from dataloading.videos.decoder import MAX_PIXELS, Video, VideoRefusedError, target_size
from dataloading.videos.sources import Source

HEIGHT, WIDTH, NUM_FRAMES = 48, 64, 10
CORNER = 16  # pixels; size of the white square at the top left of the frames


def write(
    path: Path,
    *,
    codec: str = "mpeg4",
    pixels: str = "yuv420p",
    size: tuple[int, int] = (HEIGHT, WIDTH),
    times: range | list[int] = range(NUM_FRAMES),
    rotation: int = 0,
) -> Path:
    """Write a video with a white top left corner; its frames are shown at `times`, in 25ths of a second."""
    image = np.full((*size, 3), 40, np.uint8)
    image[:CORNER, :CORNER] = 255
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width = size
        stream.pix_fmt = pixels
        stream.time_base = stream.codec_context.time_base = Fraction(1, 25)
        if rotation:
            stream.set_display_rotation(rotation)
        container.start_encoding()
        for time in times:
            frame = av.VideoFrame.from_ndarray(image)
            frame.pts = time
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def process(path: Path, **options: int) -> Sample | RefusedVideo:
    config = BuildConfig(**{"flow": "dis", "short_side": 0, "window": 4, **options})
    return VideoProcessor(path.parent, ("a",), config)(Source(path.name, 0))


def refusal(path: Path) -> str:
    result = process(path)
    assert isinstance(result, RefusedVideo)
    return result.reason


@pytest.mark.parametrize(("rotation", "row", "column"), [(-90, 0, -1), (90, -1, 0), (180, -1, -1)])
def test_a_rotated_video_is_decoded_upright(tmp_path: Path, rotation: int, row: int, column: int) -> None:
    with Video(write(tmp_path / "rotated.mp4", rotation=rotation), 0) as video:
        frames = list(video)
        shape = (HEIGHT, WIDTH) if rotation == 180 else (WIDTH, HEIGHT)
        assert (video.height, video.width) == frames[0].shape[:2] == shape
    corners = [(y, x) for y in (0, -1) for x in (0, -1) if frames[0][y, x].mean() > 150]
    assert corners == [(row, column)]


@pytest.mark.parametrize(
    ("matrix", "row", "column"),
    [
        ((-1, 0, 0, 1), 0, -1),
        ((1, 0, 0, -1), -1, 0),
        ((0, 1, 1, 0), 0, 0),
        ((0, -1, -1, 0), -1, -1),
        ((0, 1, -1, 0), 0, -1),
    ],
)
def test_a_video_with_a_mirroring_matrix_is_decoded_mirrored(
    tmp_path: Path, matrix: tuple[int, int, int, int], row: int, column: int
) -> None:
    with Video(set_matrix(write(tmp_path / "mirrored.mp4"), matrix), 0) as video:
        frames = list(video)
    assert frames[0].shape[:2] == ((HEIGHT, WIDTH) if matrix[0] else (WIDTH, HEIGHT))
    corners = [(y, x) for y in (0, -1) for x in (0, -1) if frames[0][y, x].mean() > 150]
    assert corners == [(row, column)]


@pytest.mark.parametrize("matrix", [(0.7, 0.7, -0.7, 0.7), (1, 0.5, 0, 1), (1, 0, 0, 0)])
def test_a_video_at_another_angle_is_refused(tmp_path: Path, matrix: tuple[float, float, float, float]) -> None:
    path = set_matrix(write(tmp_path / "angle.mp4"), matrix)
    assert refusal(path) == "turned: it is to be shown at an angle, only quarters are known; turn it upright"


def set_matrix(path: Path, matrix: tuple[float, float, float, float]) -> Path:
    """Set the display matrix, given by its rows: a pixel (x, y) appears at (x, y) times it."""
    a, b, c, d = (round(number * 2**16) for number in matrix)
    data = bytearray(path.read_bytes())
    # ISO 14496-12: the matrix is the third last field of the track header.
    struct.pack_into(">9i", data, data.index(b"tkhd") + 44, a, b, 0, c, d, 0, 0, 0, 2**30)
    path.write_bytes(data)
    return path


def test_a_rotated_video_is_stored_upright(tmp_path: Path) -> None:
    sample = process(write(tmp_path / "rotated.mp4", rotation=90), short_side=36)
    assert isinstance(sample, Sample)
    assert (sample.info["height"], sample.info["width"]) == (48, 36)
    assert (sample.info["flow_height"], sample.info["flow_width"]) == (48, 36)


def test_every_frame_of_a_video_with_a_variable_rate_is_stored_once(tmp_path: Path) -> None:
    sample = process(write(tmp_path / "variable.mkv", codec="ffv1", times=[0, 1, 2, 10, 30, 31, 50, 51, 52, 90]))
    assert isinstance(sample, Sample)
    assert sample.info["frames"] == NUM_FRAMES
    assert sample.info["fps"] > 0


def test_a_variable_rate_is_stored_as_its_average(tmp_path: Path) -> None:
    sample = process(write(tmp_path / "variable.mp4", times=[0, 1, 2, 10, 30, 31, 50, 51, 52, 99]))
    assert isinstance(sample, Sample)
    assert sample.info["fps"] == pytest.approx(NUM_FRAMES / 4, rel=0.05)


def test_ten_bit_colours_are_converted_to_eight_bits(tmp_path: Path) -> None:
    with Video(write(tmp_path / "deep.mkv", codec="ffv1", pixels="yuv420p10le"), 0) as video:
        frame = next(iter(video))
    assert frame.dtype == np.uint8
    assert np.abs(frame[:CORNER, :CORNER].astype(int) - 255).max() < 5
    assert np.abs(frame[CORNER:, CORNER:].astype(int) - 40).max() < 5


@pytest.mark.parametrize("flow", ["dis", "tvl1"])
def test_odd_frame_sizes_are_kept(tmp_path: Path, flow: str) -> None:
    path = write(tmp_path / "odd.mkv", codec="ffv1", pixels="yuv444p", size=(49, 67))
    sample = VideoProcessor(tmp_path, ("a",), BuildConfig(flow, short_side=0, window=4))(Source(path.name, 0))
    assert isinstance(sample, Sample)
    assert (sample.info["height"], sample.info["width"]) == (49, 67)


@pytest.mark.parametrize("num_frames", [0, 1])
@pytest.mark.parametrize("suffix", ["avi", "mkv", "mp4"])
def test_a_video_of_no_or_one_frame_is_refused(tmp_path: Path, num_frames: int, suffix: str) -> None:
    reason = refusal(write(tmp_path / f"few.{suffix}", times=range(num_frames)))
    assert reason.partition(":")[0] in ("too short", "unreadable", "no video stream")


@pytest.mark.parametrize("size", [(100_000, 100_000), (30_000, 8_000), (2**31 - 1, 1), (0, 0)])
@pytest.mark.parametrize(("codec", "pixels"), [("rawvideo", "bgr24"), ("ffv1", "yuv420p")])
def test_a_header_with_an_enormous_frame_size_is_refused_before_allocation(
    tmp_path: Path, size: tuple[int, int], codec: str, pixels: str
) -> None:
    path = write(tmp_path / "huge.avi", codec=codec, pixels=pixels)
    data = bytearray(path.read_bytes())
    struct.pack_into("<ii", data, data.index(b"strf") + 12, *size)
    path.write_bytes(data)
    assert refusal(path).partition(":")[0] in ("unreadable", "too large", "truncated")


def test_a_video_that_resizing_would_make_enormous_is_refused() -> None:
    assert target_size(4320, 7680, 0) == (4320, 7680)
    with pytest.raises(VideoRefusedError, match=rf"^too large: \d+x256 pixels, at most {MAX_PIXELS} are taken"):
        target_size(2, 30_000, 256)


def test_a_playlist_named_like_a_video_opens_nothing(tmp_path: Path) -> None:
    write(tmp_path / "other.mp4")
    playlist = tmp_path / "playlist.mp4"
    playlist.write_text("ffconcat version 1.0\nfile 'http://127.0.0.1:9/other.mp4'\n")
    assert refusal(playlist).startswith("unreadable: ")
