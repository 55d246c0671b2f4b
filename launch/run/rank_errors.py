"""Errors that only one rank can meet."""

from collections.abc import Iterator
from contextlib import contextmanager

from mcl_dist.distributed.process_group import ProcessGroup
from mcl_dist.errors import RankError, UserError


@contextmanager
def errors_name_rank(group: ProcessGroup) -> Iterator[None]:
    """Within, a `UserError` becomes a `RankError` that names the rank: every rank reads other files than the others."""
    try:
        yield
    except UserError as error:
        raise RankError(f"rank {group.rank}: {error}" if group.size > 1 else str(error)) from error
