"""The checkpoints of one run: taken and written while training goes on."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from dataclasses import dataclass

import torch

from mcl_dist.checkpoint.consensus import Consensus
from mcl_dist.checkpoint.format import NETWORK, STATE, statistics_file, step_folder, step_of
from mcl_dist.checkpoint.integrity import TornError
from mcl_dist.checkpoint.reader import Check, newest, read_snapshot
from mcl_dist.checkpoint.staging import StagingBuffer
from mcl_dist.checkpoint.state import CheckpointShard, Snapshot
from mcl_dist.checkpoint.writer import Writer
from mcl_dist.config import number
from mcl_dist.distributed.process_group import ProcessGroup
from mcl_dist.errors import UserError
from mcl_dist.events import CheckpointFailed, CheckpointRefused, CheckpointWritten, Notice
from mcl_dist.storage.folder import Folder
from mcl_dist.storage.retry import RetryPolicy
from mcl_dist.storage.store_requests import without_credentials

FILES_AT_MOST = 6  # that one rank writes, each with the store's patience
SILENCE_SECONDS = 1800.0  # that a rank may take beyond that
NICENESS = 10  # of the writing thread: where cores are scarce they are training's
ASKING_SECONDS = 0.1  # between two looks at whether a checkpoint is still being written
NONE, FAILED = -1, -2  # what the first rank says where there is no step to say

News = CheckpointWritten | CheckpointFailed | Notice


@dataclass(frozen=True)
class CheckpointConfig:
    """When and where checkpoints are written.

    Attributes:
        every: steps between checkpoints; the last step always has one.
        keep: newest checkpoints kept.
        keep_every: those of steps that this divides are kept for good.
        folder: URL to write to, which all nodes share; none means `checkpoints` in the run folder.
        retry_seconds: how long a store that fails is asked again for each file.
        max_failures: checkpoints in a row that cannot be written and end the run; it goes on after fewer.
    """

    every: int = number(1000, minimum=1)
    keep: int = number(3, minimum=1)
    keep_every: int | None = number(None, minimum=1)
    folder: str | None = None
    retry_seconds: float = number(300.0, minimum=0)
    max_failures: int = number(3, minimum=1)


class CheckpointManager:
    """The checkpoints below one URL, all ranks together; at most one is being written."""

    def __init__(self, url: str, group: ProcessGroup, settings: CheckpointConfig | None = None) -> None:
        self._settings = settings or CheckpointConfig()
        self._group = group
        self._news: deque[News] = deque()
        patience = RetryPolicy(self._settings.retry_seconds, tell=self._notice)
        self._folder = Folder(url, patience)
        self.url = without_credentials(self._folder.url)  # as it is told
        self._council = Consensus(group, SILENCE_SECONDS + FILES_AT_MOST * patience.seconds)
        self._writer = Writer(
            self._folder,
            self._council,
            keep=self._settings.keep,
            keep_every=self._settings.keep_every,
            tell=self._notice,
        )
        self._copy = StagingBuffer(group.device)
        self._thread: threading.Thread | None = None
        self._stall = 0.0  # seconds that beginning the newest one took
        self._failures_before = 0  # of requests to the store, until the checkpoint that is being written
        self._failed: CheckpointFailed | None = None
        self.newest_step: int | None = None

    def reserve(self, share: CheckpointShard) -> None:
        """Make the host memory that such a share takes, so that the first checkpoint need not."""
        self._copy.take(share.files(self._group.rank, self._group.size))

    def begin(self, share: CheckpointShard, since: float, *, network_lasts: bool = True) -> None:
        """Copy what the next forward changes, and start copying the rest and writing all of it.

        Args:
            share: this rank's. Of its tensors only the statistics may change before `await_copy` has returned.
            since: time of `time.perf_counter` from which on training stands still for it.
            network_lasts: whether the network's parameters stay where they are until then; they are copied at once
                otherwise.

        Raises:
            UserError: as `wait`, for the one before.
        """
        self.wait()
        files = share.files(self._group.rank, self._group.size)
        at_once = {statistics_file(self._group.rank)} | (set() if network_lasts else {NETWORK})
        self._copy.take(files, later=files.keys() - at_once)
        state = share.state(self._group.size) if self._group.is_first else None
        self._failures_before = self._num_failures
        self._stall = time.perf_counter() - since
        self._thread = threading.Thread(
            target=self._write, args=(share.step, state, since), name="checkpoint", daemon=True
        )
        self._thread.start()
        self._stall = time.perf_counter() - since  # with what it took to start a thread, while that is at work

    def await_copy(self) -> None:
        """Wait until nothing of the newest checkpoint is left to be copied: to be called before tensors change."""
        self._copy.wait()

    def wait(self) -> None:
        """Wait for the checkpoint that is being written.

        Raises:
            UserError: on every rank alike, when it was the last of too many in a row that failed.
        """
        self.join()
        if self._failed is not None and self._failed.in_a_row >= self._settings.max_failures:
            raise UserError(
                f"{self._failed.reason}; {self._failed.in_a_row} checkpoints in a row could not be written, and what "
                "was learnt since the last one would be lost: mend that, then start again"
            )

    def join(self, seconds: float | None = None) -> None:
        """Wait for the checkpoint that is being written, whatever becomes of it, for so long at the most."""
        if self._thread is not None:
            self._thread.join(seconds)

    @property
    def is_writing(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._thread is not None and self._thread.is_alive()

    def is_held_up(self) -> bool:
        """Whether the store lets the checkpoint wait that is being written; if it does not, waits for it.

        All ranks must ask together, and hear the same: one whose requests have to be repeated is enough.
        """
        while True:
            is_failing = self._num_failures > self._failures_before
            writing, failing = self._group.sum(
                torch.tensor([float(self.is_writing), float(self.is_writing and is_failing)])
            ).tolist()
            if failing or not writing:
                return bool(failing)
            self.join(ASKING_SECONDS)

    def save(self, share: CheckpointShard) -> str:
        """Write a checkpoint and wait for it; returns its URL.

        Raises:
            UserError: on every rank alike, when it failed.
        """
        self.begin(share, time.perf_counter())
        self.finish()
        return self.step_url(share.step)

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, which has to succeed.

        Raises:
            UserError: on every rank alike, when it failed.
        """
        self.wait()
        if self._failed is not None:
            raise UserError(self._failed.reason)

    def news(self) -> list[News]:
        """What has become of checkpoints since this was last asked; waits for nothing."""
        return [self._news.popleft() for _ in range(len(self._news))]

    def latest(self, check: Check = lambda *_: None) -> tuple[int | None, list[CheckpointRefused]]:
        """Step of the newest checkpoint that can be used, on all ranks, and on the first why newer ones cannot.

        Args:
            check: as of `newest`.

        Raises:
            UserError: when there are complete checkpoints and none can be used, or the store fails.
        """
        self.join()
        refused: list[CheckpointRefused] = []
        if not self._group.is_first:
            step = self._group.from_first(NONE)
        else:
            try:
                found, refused = self._newest(check)
            except UserError:
                self._group.from_first(FAILED)
                raise
            step = self._group.from_first(NONE if found is None else found)
        if step == FAILED:
            raise UserError(f"{self.url}: the first rank can use none of the checkpoints; see what it says")
        self.newest_step = None if step == NONE else step
        return self.newest_step, refused

    def load(self, step: int) -> Snapshot:
        """Read a checkpoint; with another number of ranks, statistics are the mean over the ranks that saved."""
        url = f"{self._folder.url}/{step_folder(step)}"
        return read_snapshot(url, rank=self._group.rank, count=self._group.size)

    def step_url(self, step: int) -> str:
        """Where the checkpoint of a step lies, as people are told: without credentials."""
        return f"{self.url}/{step_folder(step)}"

    @property
    def _num_failures(self) -> int:
        return sum(self._folder.patience.failures.copy().values())

    def _newest(self, check: Check) -> tuple[int | None, list[CheckpointRefused]]:
        step, damaged = newest(self._folder, check)
        complete = [error for error in damaged if not isinstance(error, TornError)]
        if step is None and complete:
            raise UserError(
                f"{without_credentials(complete[0].url)}: {complete[0].reason}; none of {len(complete)} checkpoints "
                "can be used: restore one, or choose another run.dir to start from nothing"
            )
        self._writer.refused = {step_of(error.url) for error in complete}
        return step, [CheckpointRefused(without_credentials(error.url), error.reason) for error in damaged]

    def _write(self, step: int, state: bytes | None, since: float) -> None:
        """What the thread does; tells how it went."""
        own = {} if state is None else {STATE: state}
        url = self.step_url(step)
        try:
            self._council.together(self._copy.fill)  # training may wait for it: it yields to nobody
            _yield_to_training()
            num_bytes = self._writer.write(step, lambda: own | self._copy.files())
        except UserError as error:
            in_a_row = 1 + (self._failed.in_a_row if self._failed else 0)
            self._failed = CheckpointFailed(step, url, str(error), in_a_row)
            self._news.append(self._failed)
            return
        self._failed, self.newest_step = None, step
        stall = self._stall + self._copy.seconds_waited()
        self._news.append(CheckpointWritten(step, url, time.perf_counter() - since, stall, num_bytes))

    def _notice(self, line: str) -> None:
        self._news.append(Notice(line))


def _yield_to_training() -> None:
    own_thread = threading.get_native_id()
    os.setpriority(os.PRIO_PROCESS, own_thread, max(NICENESS, os.getpriority(os.PRIO_PROCESS, own_thread)))
