"""The checkpoints of one run, staged and written while training continues."""

import os
import threading
import time
from collections import deque
from dataclasses import dataclass

import torch

from mcl_dist.checkpoint.consensus import Consensus
from mcl_dist.checkpoint.format import NETWORK, STATE, rank_file, step_folder, step_of
from mcl_dist.checkpoint.integrity import IncompleteCheckpointError
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

MAX_FILES_PER_RANK = 6  # each may use up the store's retry time
ANSWER_SECONDS = 1800.0  # that a rank may take in addition
NICENESS = 10  # of the writing thread: scarce cores belong to training
POLL_SECONDS = 0.1  # between two checks whether a checkpoint is still being written
NONE, FAILED = -1, -2  # what the first rank broadcasts instead of a step

CheckpointEvent = CheckpointWritten | CheckpointFailed | Notice


@dataclass(frozen=True)
class CheckpointConfig:
    """When and where checkpoints are written.

    Attributes:
        every: steps between checkpoints; the last step always has one.
        keep: number of newest checkpoints to keep.
        keep_every: checkpoints of steps divisible by this are kept forever.
        folder: URL to write to, shared by all nodes; none means `checkpoints` in the run folder.
        retry_seconds: how long failed requests to the store are retried, per file.
        max_failures: consecutive failed checkpoints that end the run.
    """

    every: int = number(1000, minimum=1)
    keep: int = number(3, minimum=1)
    keep_every: int | None = number(None, minimum=1)
    folder: str | None = None
    retry_seconds: float = number(300.0, minimum=0)
    max_failures: int = number(3, minimum=1)


class CheckpointManager:
    """Saves and loads the checkpoints below one URL, on all ranks together; writes at most one at a time.

    Attributes:
        url: without credentials, for messages.
        newest_step: of the newest usable checkpoint, once known.
        staging: host memory for this rank's files.
        consensus: among the ranks' writing threads.
    """

    def __init__(self, url: str, group: ProcessGroup, settings: CheckpointConfig | None = None) -> None:
        self._settings = settings or CheckpointConfig()
        self._group = group
        self._events: deque[CheckpointEvent] = deque()
        retry = RetryPolicy(self._settings.retry_seconds, warn=self._notify)
        self._folder = Folder(url, retry)
        self.url = without_credentials(self._folder.url)
        self.consensus = Consensus(group, ANSWER_SECONDS + MAX_FILES_PER_RANK * retry.seconds)
        keep, keep_every = self._settings.keep, self._settings.keep_every
        self._writer = Writer(self._folder, self.consensus, keep=keep, keep_every=keep_every, notify=self._notify)
        self.staging = StagingBuffer(group.device)
        self._thread: threading.Thread | None = None
        self._begin_seconds = 0.0  # for which beginning the newest checkpoint blocked training
        self._failures_before = 0  # store requests that had failed when the newest checkpoint began
        self._failed: CheckpointFailed | None = None
        self.newest_step: int | None = None

    def reserve(self, shard: CheckpointShard) -> None:
        """Allocate the host memory for such a shard, so that the first checkpoint need not."""
        self.staging.stage(shard.files(self._group.rank, self._group.size))

    def begin_save(self, shard: CheckpointShard, since: float, *, defer_network: bool = True) -> None:
        """Copy the tensors that the next forward pass changes; copy the others and write all in a thread.

        Args:
            shard: this rank's. Only its statistics may change before `wait_for_copy` has returned.
            since: `time.perf_counter` when training stopped for this checkpoint.
            defer_network: whether the thread copies the network's parameters, which then stay in place until
                `wait_for_copy` has returned; otherwise they are copied at once.

        Raises:
            UserError: as `wait`, for the previous checkpoint.
        """
        self.wait()
        files = shard.files(self._group.rank, self._group.size)
        immediate = {rank_file("statistics", self._group.rank)} | (set() if defer_network else {NETWORK})
        self.staging.stage(files, deferred=files.keys() - immediate)
        state = shard.state(self._group.size) if self._group.is_first else None
        self._failures_before = self._num_failures
        self._begin_seconds = time.perf_counter() - since
        arguments = (shard.step, state, since)
        self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()
        self._begin_seconds = time.perf_counter() - since  # now with the thread's start; the thread reads it later

    def wait_for_copy(self) -> None:
        """Block until all tensors of the newest checkpoint are copied; call it before tensors change."""
        self.staging.wait()

    def wait(self) -> None:
        """Wait for the checkpoint that is being written.

        Raises:
            UserError: on every rank alike, if it was one too many consecutive failures.
        """
        self.join()
        if self._failed is not None and self._failed.in_a_row >= self._settings.max_failures:
            raise UserError(
                f"{self._failed.reason}; {self._failed.in_a_row} checkpoints in a row could not be written; the run "
                "stops because further progress could be lost: fix the cause, then start it again"
            )

    def join(self, seconds: float | None = None) -> None:
        """Wait for the checkpoint that is being written, for at most `seconds`, whether or not it succeeds."""
        if self._thread is not None:
            self._thread.join(seconds)

    @property
    def is_writing(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._thread is not None and self._thread.is_alive()

    def wait_unless_store_fails(self) -> bool:
        """Wait for the checkpoint that is being written, unless any rank has to repeat requests to the store.

        A collective call; returns whether the store delays the checkpoint, equal on all ranks.
        """
        while True:
            is_failing = self._num_failures > self._failures_before
            flags = [float(self.is_writing), float(self.is_writing and is_failing)]
            writing, failing = self._group.sum(torch.tensor(flags)).tolist()
            if failing or not writing:
                return bool(failing)
            self.join(POLL_SECONDS)

    def save(self, shard: CheckpointShard) -> str:
        """Write a checkpoint and wait for it; returns its URL.

        Raises:
            UserError: on every rank alike, if it failed.
        """
        self.begin_save(shard, time.perf_counter())
        self.finish()
        return self.step_url(shard.step)

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, and require that it succeeds.

        Raises:
            UserError: on every rank alike, if it failed.
        """
        self.wait()
        if self._failed is not None:
            raise UserError(self._failed.reason)

    def pop_events(self) -> list[CheckpointEvent]:
        """Events since the last call, without waiting."""
        return [self._events.popleft() for _ in range(len(self._events))]

    def latest(self, check: Check = lambda *_: None) -> tuple[int | None, list[CheckpointRefused]]:
        """Step of the newest usable checkpoint on all ranks, and on the first rank the newer ones that were rejected.

        `check` is as for `newest`.

        Raises:
            UserError: there are complete checkpoints but none is usable, or the store fails.
        """
        self.join()
        rejected: list[CheckpointRefused] = []
        if not self._group.is_first:
            step = self._group.from_first(NONE)
        else:
            try:
                found, rejected = self._newest(check)
            except UserError:
                self._group.from_first(FAILED)
                raise
            step = self._group.from_first(NONE if found is None else found)
        if step == FAILED:
            raise UserError(f"{self.url}: the first rank found no usable checkpoint; see its message")
        self.newest_step = None if step == NONE else step
        return self.newest_step, rejected

    def load(self, step: int) -> Snapshot:
        """Read a checkpoint; if another number of ranks saved it, statistics are the mean over those ranks."""
        url = f"{self._folder.url}/{step_folder(step)}"
        return read_snapshot(url, rank=self._group.rank, count=self._group.size)

    def step_url(self, step: int) -> str:
        """URL of a step's checkpoint, without credentials."""
        return f"{self.url}/{step_folder(step)}"

    @property
    def _num_failures(self) -> int:
        return sum(self._folder.retry.failures.copy().values())

    def _newest(self, check: Check) -> tuple[int | None, list[CheckpointRefused]]:
        step, errors = newest(self._folder, check)
        complete = [error for error in errors if not isinstance(error, IncompleteCheckpointError)]
        if step is None and complete:
            raise UserError(
                f"{without_credentials(complete[0].url)}: {complete[0].reason}; none of {len(complete)} checkpoints "
                "can be used: restore one, or choose another run.dir to start from scratch"
            )
        self._writer.rejected = {step_of(error.url) for error in complete}
        return step, [CheckpointRefused(without_credentials(error.url), error.reason) for error in errors]

    def _write(self, step: int, state: bytes | None, since: float) -> None:
        """Body of the writing thread; queues an event with the outcome."""
        own_files = {} if state is None else {STATE: state}
        url = self.step_url(step)
        try:
            self.consensus.run_on_all_ranks(self.staging.copy_deferred)  # at full priority: training may wait for it
            thread = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, thread, max(NICENESS, os.getpriority(os.PRIO_PROCESS, thread)))
            num_bytes = self._writer.write(step, lambda: own_files | self.staging.files())
        except UserError as error:
            in_a_row = 1 + (self._failed.in_a_row if self._failed else 0)
            self._failed = CheckpointFailed(step, url, str(error), in_a_row)
            self._events.append(self._failed)
            return
        self._failed, self.newest_step = None, step
        stall = self._begin_seconds + self.staging.seconds_waited()
        self._events.append(CheckpointWritten(step, url, time.perf_counter() - since, stall, num_bytes))

    def _notify(self, text: str) -> None:
        self._events.append(Notice(text))
