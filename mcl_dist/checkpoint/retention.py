"""Which checkpoints are kept."""

from collections.abc import Collection


def expired(steps: Collection[int], keep: int, keep_every: int | None) -> list[int]:
    """Steps whose checkpoints may be removed, oldest first.

    Args:
        steps: of all complete checkpoints that are not rejected.
        keep: number of newest checkpoints to keep.
        keep_every: steps divisible by this are kept forever; None keeps none forever.
    """
    older = sorted(steps)[:-keep]
    return [step for step in older if keep_every is None or step % keep_every]
