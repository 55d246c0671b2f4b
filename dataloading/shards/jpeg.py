"""What a JPEG's header says, read without decoding it."""

from __future__ import annotations

JPEG_START, JPEG_END = b"\xff\xd8", b"\xff\xd9"
# Frame headers of baseline, extended and progressive JPEG; the other kinds are not written by anything we read.
SIZE_MARKERS = (0xC0, 0xC1, 0xC2)
SCAN_MARKER = 0xDA


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Height and width that a JPEG's header states; None when it has no proper beginning, header or end.

    A decoder given a broken still fails its whole batch without a word on which, so all are looked at.
    """
    if not (data.startswith(JPEG_START) and data.endswith(JPEG_END)):
        return None
    at = len(JPEG_START)
    while at + 9 <= len(data) and data[at] == JPEG_START[0] and data[at + 1] != SCAN_MARKER:
        if data[at + 1] in SIZE_MARKERS:
            return int.from_bytes(data[at + 5 : at + 7], "big"), int.from_bytes(data[at + 7 : at + 9], "big")
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None
