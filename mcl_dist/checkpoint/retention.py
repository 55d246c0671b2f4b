"""Which checkpoints stay."""

from __future__ import annotations

from collections.abc import Collection


def leaving(steps: Collection[int], keep: int, keep_every: int | None) -> list[int]:
    """Steps whose checkpoints may go, oldest first.

    Args:
        steps: of all complete checkpoints that are known to be good.
        keep: newest ones that stay.
        keep_every: steps that this divides stay for good; none lets them all go in time.
    """
    older = sorted(steps)[:-keep]
    return [step for step in older if keep_every is None or step % keep_every]
