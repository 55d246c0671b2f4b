"""Find stored videos that look alike: a perceptual hash of a few frames, and a search for nearly equal hashes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from dataloading.shards.format import NearDuplicate

HASHED_POSITIONS = (0.25, 0.5, 0.75)  # frames to hash, as a share of the video's length
ROWS, COLUMNS = 8, 8  # bits of the hash of a frame
BAND_BYTES = 2
NUM_BYTES = len(HASHED_POSITIONS) * ROWS * COLUMNS // 8
# With fewer differing bits than bands at least one band is equal, so the search misses no pair. Copies of five real
# clips, encoded and scaled anew, differ from them in 0 to 5 bits; different clips differ in 66 and more.
MAX_DIFFERING = NUM_BYTES // BAND_BYTES - 1
NUM_BITS_OF = np.array([number.bit_count() for number in range(256)], dtype=np.uint8)


@dataclass(frozen=True)
class VideoHash:
    """Source and hexadecimal hash of a stored video."""

    source: str
    dhash: str


def dhash(frames: Sequence[bytes]) -> str:
    """Hash a video's JPEG stills: shrink three of them, and compare each pixel with its right neighbour."""
    bits = []
    for position in HASHED_POSITIONS:
        still = np.frombuffer(frames[int(position * len(frames))], dtype=np.uint8)
        grey = np.asarray(cv2.imdecode(still, cv2.IMREAD_GRAYSCALE))
        small = cv2.resize(grey, (COLUMNS + 1, ROWS), interpolation=cv2.INTER_AREA)
        bits.append(small[:, :-1] > small[:, 1:])
    return np.packbits(np.array(bits)).tobytes().hex()


def near_duplicates(videos: Sequence[VideoHash]) -> tuple[NearDuplicate, ...]:
    """Each video that looks like an earlier one, with the earliest such; in the order given."""
    hashes = np.array([list(bytes.fromhex(video.dhash)) for video in videos], dtype=np.uint8).reshape(-1, NUM_BYTES)
    earliest: dict[int, tuple[int, int]] = {}
    for group in _groups_with_equal_band(hashes):
        for place, first in enumerate(group[:-1].tolist()):
            later = group[place + 1 :]
            differing = NUM_BITS_OF[hashes[later] ^ hashes[first]].sum(axis=1)
            for other in np.flatnonzero(differing <= MAX_DIFFERING).tolist():
                found = (first, int(differing[other]))
                earliest[int(later[other])] = min(found, earliest.get(int(later[other]), found))
    return tuple(
        NearDuplicate(videos[later].source, videos[first].source, bits)
        for later, (first, bits) in sorted(earliest.items())
    )


def _groups_with_equal_band(hashes: np.ndarray) -> Iterator[np.ndarray]:
    """Ascending positions of each group of two or more hashes that agree in one band."""
    for start in range(0, NUM_BYTES, BAND_BYTES):
        band = hashes[:, start].astype(np.int64) << 8 | hashes[:, start + 1]
        order = np.argsort(band, kind="stable")
        borders = np.flatnonzero(np.diff(band[order])) + 1
        yield from (group for group in np.split(order, borders) if len(group) > 1)
