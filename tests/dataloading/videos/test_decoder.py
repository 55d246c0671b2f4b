from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from dataloading.synthetic.videos import FPS, write_video
from dataloading.videos.decoder import Video, VideoRefusedError, resize_frame, target_size


def write(path: Path, num_frames: int = 40) -> Path:
    frames = np.random.default_rng(0).integers(0, 256, (num_frames, 48, 64), dtype=np.uint8)
    write_video(path, frames)
    return path


def cut(path: Path, share: float) -> Path:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path


def decode(path: Path, short_side: int = 0) -> list[np.ndarray]:
    with Video(path, short_side) as video:
        return list(video)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_every_frame_is_decoded_to_rgb(tmp_path: Path, suffix: str) -> None:
    frames = decode(write(tmp_path / f"video{suffix}"))
    assert {frame.shape for frame in frames} == {(48, 64, 3)}
    assert len(frames) == 40


def test_decoded_frames_show_the_encoded_shades(tmp_path: Path) -> None:
    shades = np.full((10, 48, 64), 50, dtype=np.uint8)
    shades[:, :, 32:] = 200
    write_video(tmp_path / "video.mp4", shades)
    frame = decode(tmp_path / "video.mp4")[5]
    assert np.abs(frame[:, 4:28].astype(int) - 50).max() < 12
    assert np.abs(frame[:, 36:60].astype(int) - 200).max() < 12


@pytest.mark.parametrize("short_side", [36, 96])
def test_the_short_side_is_shrunk_or_enlarged(tmp_path: Path, short_side: int) -> None:
    frames = decode(write(tmp_path / "video.mp4", 4), short_side)
    assert {frame.shape for frame in frames} == {(short_side, short_side * 4 // 3, 3)}


def test_shrinking_averages_the_area() -> None:
    checkerboard = np.indices((8, 8)).sum(axis=0) % 2 * 200
    frame = np.repeat(checkerboard[..., None], 3, axis=2).astype(np.uint8)
    assert (resize_frame(frame, 4, 4) == 100).all()


def test_resizing_keeps_the_aspect_of_a_portrait_video() -> None:
    assert target_size(640, 360, 256) == (455, 256)


def test_a_video_has_the_frame_rate_of_its_file(tmp_path: Path) -> None:
    with Video(write(tmp_path / "video.mkv"), 0) as video:
        assert video.fps == FPS


def test_a_video_cut_off_inside_a_packet_is_refused_as_truncated(tmp_path: Path) -> None:
    with pytest.raises(VideoRefusedError, match=r"^truncated: a packet is cut off"):
        decode(cut(write(tmp_path / "video.avi"), 0.6))


def test_a_video_shorter_than_announced_is_refused_as_truncated(tmp_path: Path) -> None:
    with pytest.raises(VideoRefusedError, match=r"^truncated: [\d.]+ s of [\d.]+ s announced"):
        decode(cut(write(tmp_path / "video.mkv"), 0.6))


def test_a_video_cut_off_before_its_index_is_refused_as_unreadable(tmp_path: Path) -> None:
    with pytest.raises(VideoRefusedError, match=r"^unreadable: "):
        decode(cut(write(tmp_path / "video.mp4"), 0.6))


@pytest.mark.parametrize("data", [b"", b"no video at all"])
def test_a_file_that_is_no_video_is_refused_as_unreadable(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "video.mp4"
    path.write_bytes(data)
    with pytest.raises(VideoRefusedError, match=r"^unreadable: "):
        decode(path)


def test_a_file_without_a_video_stream_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "video.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=48000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 48000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(VideoRefusedError, match=r"^no video stream: "):
        decode(path)


def test_a_video_too_small_for_frame_maps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VideoRefusedError, match=r"^too small: 21x16 pixels"):
        decode(write(tmp_path / "video.mp4", 2), 16)


def test_a_video_cut_off_between_two_packets_is_refused_as_truncated(tmp_path: Path) -> None:
    path = write(tmp_path / "video.avi")
    with av.open(str(path)) as container:
        positions = [packet.pos for packet in container.demux(video=0) if packet.pos is not None]
    path.write_bytes(path.read_bytes()[: positions[30]])
    with pytest.raises(VideoRefusedError, match=r"^truncated: 30 frames of 40 announced"):
        decode(path)
