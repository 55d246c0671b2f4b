"""The error for one damaged sample, which a loader replaces."""

from __future__ import annotations

from mcl_dist.errors import UserError
from mcl_dist.events import BadSampleReason


class BadSampleError(UserError):
    """One sample of a set cannot be used; the others may be sound.

    Attributes:
        shard: URL of its shard.
        key: of the sample.
        reason: `checksum` (the bytes do not match their checksum), `header` (no JPEG, JSON or array), `size` (an image
            of another size), `missing` (bytes or a shard that do not exist or cannot be read), `maps` (maps or scores
            that do not fit the frames), `decode` (the decoder rejects a still that passed all other checks).
    """

    def __init__(self, shard: str, key: str, reason: BadSampleReason, detail: str) -> None:
        folder = shard.rpartition("/")[0]
        super().__init__(f"{shard}, video {key}: {detail}; run `mcl shards verify {folder}`")
        self.shard = shard
        self.key = key
        self.reason = reason
        self._detail = detail

    def __reduce__(self) -> tuple[type[BadSampleError], tuple[str, str, BadSampleReason, str]]:
        # Worker processes send errors to their parent; by default pickle would lose the attributes.
        return type(self), (self.shard, self.key, self.reason, self._detail)
