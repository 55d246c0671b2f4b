"""Label values of the data path's metrics: the loader and the builder report them, `monitoring` exports them."""

from typing import Literal, get_args

LoaderStage = Literal["draw and read", "decode", "decode flow", "augment", "target"]
BadSampleReason = Literal["checksum", "header", "size", "missing", "maps", "decode"]
RefusalReason = Literal[
    "missing", "outside", "duplicate", "unreadable", "no video stream", "truncated", "turned", "too small", "too large",
    "too short",
]  # fmt: skip

LOADER_STAGES: tuple[LoaderStage, ...] = get_args(LoaderStage)
BAD_SAMPLE_REASONS: tuple[BadSampleReason, ...] = get_args(BadSampleReason)
REFUSAL_REASONS: tuple[RefusalReason, ...] = get_args(RefusalReason)
