"""What is wrong with one stored sample, told so that a loader can replace it and go on."""

from __future__ import annotations

from typing import Literal, get_args

from mcl_dist.errors import UserError

Reason = Literal["checksum", "header", "size", "missing", "maps", "decode"]
REASONS: tuple[Reason, ...] = get_args(Reason)


class BadSampleError(UserError):
    """One sample of a set cannot be used; all others may well be.

    Attributes:
        shard: URL of its shard.
        key: of the sample.
        reason: `checksum` (bytes are not those that were stored), `header` (no JPEG, JSON or array),
            `size` (a picture of another size), `missing` (bytes or a shard that are not there or cannot be
            read), `maps` (maps or scores that do not fit the frames), `decode` (the decoder refuses a still
            that passed all else).
    """

    def __init__(self, shard: str, key: str, reason: Reason, detail: str) -> None:
        folder = shard.rpartition("/")[0]
        super().__init__(f"{shard}, video {key}: {detail}; run `mcl shards verify {folder}`")
        self.shard = shard
        self.key = key
        self.reason = reason
        self._detail = detail

    def __reduce__(self) -> tuple[type[BadSampleError], tuple[str, str, Reason, str]]:
        # Worker processes hand errors to their parent; without this the attributes would stay behind.
        return type(self), (self.shard, self.key, self.reason, self._detail)
