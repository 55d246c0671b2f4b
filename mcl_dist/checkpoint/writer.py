"""Checkpoints written in two phases: every rank its files, synced; then, when all have, `COMMITTED` by the first."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from mcl_dist.checkpoint.consensus import Consensus
from mcl_dist.checkpoint.format import COMMITTED, FileDigest, step_folder, steps_in
from mcl_dist.checkpoint.retention import leaving
from mcl_dist.errors import UserError
from mcl_dist.storage.folder import Folder
from mcl_dist.storage.retry import RetryPolicy, TransientError
from mcl_dist.storage.store_requests import without_credentials

Buffer = bytes | memoryview

CLEANING_SECONDS = 10.0  # for a store that is perhaps the reason for cleaning
SEEING_SECONDS = 60.0  # until the first rank sees what another wrote: network disks may take half a minute


class Writer:
    """One rank's part in writing the checkpoints of a run, all ranks together.

    Args:
        folder: in which the `step-…` folders are.
        council: of the ranks.
        keep, keep_every: as `retention.leaving` has them.
        tell: is told in a line what a person should know though it fails nothing.

    Attributes:
        refused: steps of checkpoints that are complete but not to be used; they neither go nor count.
    """

    def __init__(
        self,
        folder: Folder,
        council: Consensus,
        *,
        keep: int,
        keep_every: int | None,
        tell: Callable[[str], None],
    ) -> None:
        self._folder = folder
        self._council = council
        self._keep, self._keep_every = keep, keep_every
        self._tell = tell
        self.refused: set[int] = set()
        self._complete: set[int] = set()

    def write(self, step: int, files: Callable[[], Mapping[str, Buffer]]) -> int:
        """Write a checkpoint; returns its bytes, over all ranks.

        Args:
            step: its number.
            files: asked for this rank's, by name.

        Raises:
            UserError: on every rank alike; what was written is no checkpoint then, and removed as far as possible.
        """
        try:
            self._council.together(self._on_first(lambda: self._make_room(step)))
            told = self._council.together(lambda: self._write_files(step, files()))
            seals = {name: seal for of_rank in told for name, seal in of_rank.items()}
            self._council.together(self._on_first(lambda: self._commit(step, seals)))
        except UserError:
            self._cleaned(lambda: self._remove(step, CLEANING_SECONDS))
            raise
        self._cleaned(lambda: self._retire(step))
        return sum(seal["bytes"] for seal in seals.values())

    def _make_room(self, step: int) -> None:
        """Remove what was never completed, and what stands in the way."""
        for other in steps_in(self._folder):
            if other in self._complete or other in self.refused - {step}:
                continue
            if other != step and self._folder.exists(f"{step_folder(other)}/{COMMITTED}"):
                self._complete.add(other)
            else:
                self._remove(other)

    def _write_files(self, step: int, files: Mapping[str, Buffer]) -> dict[str, Any]:
        folder = self._below(step)
        for name, data in files.items():
            folder.write(name, data)
        return {name: asdict(FileDigest(len(data), hashlib.sha256(data).hexdigest())) for name, data in files.items()}

    def _commit(self, step: int, seals: dict[str, Any]) -> None:
        folder = self._below(step)
        sizes = {name: seal["bytes"] for name, seal in seals.items()}
        RetryPolicy(SEEING_SECONDS).until_it_works(lambda: _see(folder, sizes))
        folder.write(COMMITTED, json.dumps({"files": seals}).encode())

    def _retire(self, step: int) -> None:
        self._complete.add(step)
        self.refused.discard(step)
        for old in leaving(self._complete, self._keep, self._keep_every):
            self._remove(old)

    def _remove(self, step: int, seconds: float | None = None) -> None:
        """Remove a checkpoint so that it is never seen complete with files missing."""
        folder = self._folder if seconds is None else self._folder.with_patience(RetryPolicy(seconds))
        self._complete.discard(step)
        folder.remove(f"{step_folder(step)}/{COMMITTED}")
        folder.remove(step_folder(step))

    def _cleaned(self, work: Callable[[], None]) -> None:
        try:
            self._on_first(work)()
        except UserError as error:
            self._tell(f"what is left of an old checkpoint could not be removed, the next one tries again: {error}")

    def _on_first(self, work: Callable[[], None]) -> Callable[[], None]:
        return work if self._council.group.is_first else lambda: None

    def _below(self, step: int) -> Folder:
        return Folder(f"{self._folder.url}/{step_folder(step)}", self._folder.patience)


def _see(folder: Folder, sizes: Mapping[str, int]) -> None:
    """Look whether all ranks' files are here: they are not where each node has a disk of its own.

    Raises:
        TransientError: when one is not.
    """
    seen = folder.files()
    for name, size in sizes.items():
        if seen.get(name) != size:
            raise TransientError(
                "short_body",
                f"{without_credentials(folder.url)}/{name}: {size} bytes were written by a rank, and the first rank "
                f"sees {seen.get(name, 'none')}; set checkpoint.folder to one that all nodes share",
            )
