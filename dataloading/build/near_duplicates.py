"""Which stored videos look alike: a perceptual hash of a few frames, and the search for those that nearly agree."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from dataloading.shards.format import NearDuplicate

MOMENTS = (0.25, 0.5, 0.75)  # of the video: the frames that are hashed
ROWS, COLUMNS = 8, 8  # bits of a frame's hash
BAND_BYTES = 2
NUM_BYTES = len(MOMENTS) * ROWS * COLUMNS // 8
# With fewer differing bits than bands at least one band agrees, so none is overlooked. Copies of five
# real clips, encoded and scaled anew, differ from them in 0 to 5 bits; the clips among themselves in 66 and more.
MAX_DIFFERING = NUM_BYTES // BAND_BYTES - 1
NUM_BITS_OF = np.array([number.bit_count() for number in range(256)], dtype=np.uint8)


@dataclass(frozen=True)
class VideoHash:
    """A stored video's source and hash, in hexadecimal."""

    source: str
    dhash: str


def dhash(frames: Sequence[bytes]) -> str:
    """Hash of a video's JPEG stills: of three of them, in small, whether each pixel is brighter than its neighbour."""
    bits = []
    for moment in MOMENTS:
        still = np.frombuffer(frames[int(moment * len(frames))], dtype=np.uint8)
        grey = np.asarray(cv2.imdecode(still, cv2.IMREAD_GRAYSCALE))
        small = cv2.resize(grey, (COLUMNS + 1, ROWS), interpolation=cv2.INTER_AREA)
        bits.append(small[:, :-1] > small[:, 1:])
    return np.packbits(np.array(bits)).tobytes().hex()


def near_duplicates(looks: Sequence[VideoHash]) -> tuple[NearDuplicate, ...]:
    """Each video that looks like an earlier one, with the earliest; in the order given."""
    hashes = np.array([list(bytes.fromhex(look.dhash)) for look in looks], dtype=np.uint8).reshape(-1, NUM_BYTES)
    earliest: dict[int, tuple[int, int]] = {}
    for alike in _sharing_a_band(hashes):
        for place, first in enumerate(alike[:-1].tolist()):
            later = alike[place + 1 :]
            differing = NUM_BITS_OF[hashes[later] ^ hashes[first]].sum(axis=1)
            for other in np.flatnonzero(differing <= MAX_DIFFERING).tolist():
                found = (first, int(differing[other]))
                earliest[int(later[other])] = min(found, earliest.get(int(later[other]), found))
    return tuple(
        NearDuplicate(looks[later].source, looks[first].source, bits)
        for later, (first, bits) in sorted(earliest.items())
    )


def _sharing_a_band(hashes: np.ndarray) -> Iterator[np.ndarray]:
    """Positions, ascending, of each two or more hashes that agree in one band."""
    for start in range(0, NUM_BYTES, BAND_BYTES):
        band = hashes[:, start].astype(np.int64) << 8 | hashes[:, start + 1]
        order = np.argsort(band, kind="stable")
        borders = np.flatnonzero(np.diff(band[order])) + 1
        yield from (group for group in np.split(order, borders) if len(group) > 1)
