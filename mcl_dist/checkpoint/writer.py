"""Writes checkpoints in two phases: every rank writes and syncs its files; then the first rank writes `COMMITTED`."""

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from typing import Any

from mcl_dist.checkpoint.consensus import Consensus
from mcl_dist.checkpoint.format import COMMITTED, FileDigest, step_folder, steps_in
from mcl_dist.errors import UserError
from mcl_dist.storage.folder import Folder
from mcl_dist.storage.retry import RetryPolicy, TransientError
from mcl_dist.storage.store_requests import without_credentials

Buffer = bytes | memoryview

CLEANUP_SECONDS = 10.0  # retry limit while cleaning up; the store may be the reason for the cleanup
VISIBILITY_SECONDS = 60.0  # until the first rank sees other ranks' files: network disks may take half a minute


class Writer:
    """Writes one rank's files of each checkpoint, together with all other ranks.

    Args:
        folder: parent of the `step-…` folders.
        keep, keep_every: as for `expired`.
        notify: called with a line about a failure that ends nothing.

    Attributes:
        rejected: steps of complete but unusable checkpoints; they are never removed and do not count for `keep`.
    """

    def __init__(
        self, folder: Folder, consensus: Consensus, *, keep: int, keep_every: int | None, notify: Callable[[str], None]
    ) -> None:
        self._folder = folder
        self._consensus = consensus
        self._keep, self._keep_every = keep, keep_every
        self._notify = notify
        self.rejected: set[int] = set()
        self._complete: set[int] = set()

    def write(self, step: int, files: Callable[[], Mapping[str, Buffer]]) -> int:
        """Write a checkpoint after `step` steps; `files` returns this rank's. Returns its bytes over all ranks.

        Raises:
            UserError: on every rank alike; the incomplete checkpoint is removed as far as possible.
        """
        try:
            self._consensus.run_on_all_ranks(self._on_first(lambda: self._remove_incomplete(step)))
            per_rank = self._consensus.run_on_all_ranks(lambda: self._write_files(step, files()))
            digests = {name: digest for of_rank in per_rank for name, digest in of_rank.items()}
            self._consensus.run_on_all_ranks(self._on_first(lambda: self._commit(step, digests)))
        except UserError:
            self._clean_up(lambda: self._remove(step, CLEANUP_SECONDS))
            raise
        self._clean_up(lambda: self._apply_retention(step))
        return sum(digest["bytes"] for digest in digests.values())

    def _remove_incomplete(self, step: int) -> None:
        """Remove incomplete checkpoints, and any checkpoint of this step."""
        for other in steps_in(self._folder):
            if other in self._complete or other in self.rejected - {step}:
                continue
            if other != step and self._folder.exists(f"{step_folder(other)}/{COMMITTED}"):
                self._complete.add(other)
            else:
                self._remove(other)

    def _write_files(self, step: int, files: Mapping[str, Buffer]) -> dict[str, Any]:
        folder = self._step_folder(step)
        for name, data in files.items():
            folder.write(name, data)
        return {name: asdict(FileDigest(len(data), hashlib.sha256(data).hexdigest())) for name, data in files.items()}

    def _commit(self, step: int, digests: dict[str, Any]) -> None:
        folder = self._step_folder(step)
        sizes = {name: digest["bytes"] for name, digest in digests.items()}
        RetryPolicy(VISIBILITY_SECONDS).call(lambda: _check_visible(folder, sizes))
        folder.write(COMMITTED, json.dumps({"files": digests}).encode())

    def _apply_retention(self, step: int) -> None:
        self._complete.add(step)
        self.rejected.discard(step)
        for old in expired(self._complete, self._keep, self._keep_every):
            self._remove(old)

    def _remove(self, step: int, retry_seconds: float | None = None) -> None:
        """Remove a checkpoint; `COMMITTED` goes first, so that no reader takes a partial folder for complete."""
        folder = self._folder if retry_seconds is None else self._folder.with_retry(RetryPolicy(retry_seconds))
        self._complete.discard(step)
        folder.remove(f"{step_folder(step)}/{COMMITTED}")
        folder.remove(step_folder(step))

    def _clean_up(self, work: Callable[[], None]) -> None:
        try:
            self._on_first(work)()
        except UserError as error:
            self._notify(f"an old checkpoint could not be removed; the next save retries: {error}")

    def _on_first(self, work: Callable[[], None]) -> Callable[[], None]:
        return work if self._consensus.group.is_first else lambda: None

    def _step_folder(self, step: int) -> Folder:
        return Folder(f"{self._folder.url}/{step_folder(step)}", self._folder.retry)


def expired(steps: Collection[int], keep: int, keep_every: int | None) -> list[int]:
    """Steps whose checkpoints may be removed, oldest first: all but the newest `keep` and multiples of `keep_every`."""
    older = sorted(steps)[:-keep]
    return [step for step in older if keep_every is None or step % keep_every]


def _check_visible(folder: Folder, sizes: Mapping[str, int]) -> None:
    """Check that this rank sees the files of all ranks; it does not if each node has its own disk.

    Raises:
        TransientError: a file is missing or short.
    """
    visible = folder.files()
    for name, size in sizes.items():
        if visible.get(name) != size:
            raise TransientError(
                "short_body",
                f"{without_credentials(folder.url)}/{name}: a rank wrote {size} bytes, but the first rank sees "
                f"{visible.get(name, 'none')}; set checkpoint.folder to one that all nodes share",
            )
