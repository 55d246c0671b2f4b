"""Two ranks save a checkpoint; one of them dies or fails at each single operation."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import distributed

from mcl_dist.checkpoint import CheckpointConfig, CheckpointManager, CheckpointShard, read_snapshot
from mcl_dist.distributed.process_group import ProcessGroup
from mcl_dist.errors import UserError
from mcl_dist.storage import folder as storage

NUM_RANKS = 2
CHANGING = ("os.rename", "os.remove", "os.rmdir", "os.mkdir")
SETTINGS = CheckpointConfig(keep=1, retry_seconds=0)
SECONDS = 300


class Faults:
    """Counts the operations of the writing thread on the disk or the store, and injects a fault at one of them.

    Args:
        at: number of that operation, counted from 1; 0 injects nothing.
        inject: kills the process or raises an error.
    """

    def __init__(self, at: int, inject: Callable[[], None]) -> None:
        self.names: list[str] = []
        self.at, self._inject = at, inject

    def count(self, name: str) -> bool:
        """Count an operation; whether it is the one to fail."""
        if threading.current_thread().name != "checkpoint":
            return False
        self.names.append(name)
        return len(self.names) == self.at

    def before(self, name: str) -> None:
        if self.count(name):
            self._inject()

    def watch_disk(self) -> None:
        """Intercept every write, sync, rename, removal and new folder."""

        def audited(event: str, arguments: tuple[Any, ...]) -> None:
            if event in CHANGING:
                self.before(f"{event} {Path(os.fsdecode(arguments[0])).name}")

        def write_bytes(path: Path, data: bytes | memoryview) -> int:
            fails = self.count(f"write {path.name}")
            with path.open("wb") as file:
                file.write(data[: len(data) // 2] if fails else data)
            if fails:
                self._inject()
            return len(data)

        def fsync(descriptor: int, sync: Callable[[int], None] = os.fsync) -> None:
            self.before("fsync")
            sync(descriptor)

        sys.addaudithook(audited)
        Path.write_bytes = write_bytes  # type: ignore[method-assign, assignment]
        os.fsync = fsync

    def watch_store(self) -> None:
        """Intercept every put and removal, before and after the request."""
        request = storage.request

        def interrupted(filesystem: Any, method: str, *arguments: Any, **options: Any) -> Any:
            if method not in ("pipe_file", "rm"):
                return request(filesystem, method, *arguments, **options)
            self.before(f"before {method} {arguments[0]}")
            result = request(filesystem, method, *arguments, **options)
            self.before(f"after {method} {arguments[0]}")
            return result

        storage.request = interrupted


def shard(step: int, rank: int, size: int = 5) -> CheckpointShard:
    parameters = {name: torch.full((size,), float(step)) for name in ("a", "b")}
    return CheckpointShard(
        step,
        network=parameters,
        momentum=parameters,
        optimizer={f"momentum_buffer/{'ab'[rank]}@0": torch.full((size,), float(step))},
        queue=torch.full((2, 3), float(step)),
        statistics={"query.mean": torch.full((2,), float(step))},
    )


def as_object_store() -> None:
    """Make `Folder` treat local folders as an object store, whose writes are atomic."""
    from fsspec.implementations.local import LocalFileSystem

    storage.Folder.is_local = property(lambda _: False)  # type: ignore[method-assign, assignment]
    storage.open_filesystem = lambda url: (LocalFileSystem(auto_mkdir=True), url)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise OSError(errno.EIO, "injected")


def run_on_ranks(work: Callable[[ProcessGroup], None], rendezvous: Path) -> list[int]:
    """Fork the ranks; returns their exit statuses."""
    children = []
    for rank in range(NUM_RANKS):
        child = os.fork()
        if not child:
            _run_rank(work, rank, rendezvous)
        children.append(child)
    statuses = [os.waitpid(child, 0)[1] for child in children]
    rendezvous.unlink(missing_ok=True)
    return statuses


def _run_rank(work: Callable[[ProcessGroup], None], rank: int, rendezvous: Path) -> NoReturn:
    try:
        distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=NUM_RANKS)
        work(ProcessGroup())
    except BaseException as error:
        print(f"rank {rank}: {error!r}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def save_one(url: str, group: ProcessGroup) -> None:
    CheckpointManager(url, group, SETTINGS).save(shard(1, group.rank))


def save_with_fault(url: str, victim: int, at: int, kind: str, watch: str, group: ProcessGroup) -> None:
    """Save a second checkpoint with a fault on the victim; after an error, save a third without."""
    checkpoints = CheckpointManager(url, group, SETTINGS)
    faults = Faults(at if group.rank == victim else 0, kill if kind == "kill" else fail)
    faults.watch_disk() if watch == "disk" else faults.watch_store()
    outcome = "written"
    try:
        checkpoints.save(shard(2, group.rank))
    except UserError as error:
        outcome = str(error)
    Path(f"{url}.{group.rank}.json").write_text(json.dumps({"names": faults.names, "outcome": outcome}))
    faults.at = 0
    if kind == "error":
        checkpoints.save(shard(3, group.rank))


def result_of(url: str, rank: int) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(Path(f"{url}.{rank}.json").read_text())
    return result


def check_resumable(url: str, expected: set[int]) -> None:
    step, _ = CheckpointManager(url, ProcessGroup(), SETTINGS).latest()
    assert step in expected, f"step {step}"
    snapshot = read_snapshot(f"{url}/step-{step:09d}")
    for tensors in (snapshot.network, snapshot.momentum, snapshot.optimizer, snapshot.statistics):
        assert all(bool((tensor == step).all()) for tensor in tensors.values())
    assert snapshot.optimizer.keys() == {"momentum_buffer/a", "momentum_buffer/b"}
    assert snapshot.queue.shape == (4, 3)


def fail_everywhere(folder: str, watch: str) -> None:
    """Kill and fail either rank at every operation; prints the operations."""
    root = Path(folder)
    if watch == "store":
        as_object_store()
    first = root / "first"
    assert run_on_ranks(partial(save_one, str(first)), root / "rendezvous") == [0, 0]
    traced = shutil.copytree(first, root / "traced")
    assert run_on_ranks(partial(save_with_fault, str(traced), 0, 0, "none", watch), root / "rendezvous") == [0, 0]
    counts = [len(result_of(str(traced), rank)["names"]) for rank in range(NUM_RANKS)]
    print(json.dumps({str(rank): result_of(str(traced), rank)["names"] for rank in range(NUM_RANKS)}))
    for victim in range(NUM_RANKS):
        for at in range(1, counts[victim] + 2):  # one more: either rank may create the folder
            for kind in ("kill", "error"):
                url = shutil.copytree(first, root / f"{victim}-{at}-{kind}")
                statuses = run_on_ranks(
                    partial(save_with_fault, str(url), victim, at, kind, watch), root / "rendezvous"
                )
                place = f"rank {victim}, {kind} at {at} of {result_of(str(traced), victim)['names']}"
                try:
                    check_outcome(str(url), victim, kind, statuses)
                except AssertionError as error:
                    raise AssertionError(f"{place}: {error}") from error
                shutil.rmtree(url)


def check_outcome(url: str, victim: int, kind: str, statuses: list[int]) -> None:
    if kind == "kill":
        assert statuses[1 - victim] == 0
        assert statuses[victim] == signal.SIGKILL or result_of(url, victim)["outcome"] == "written"
        check_resumable(url, {1, 2})
        return
    assert statuses == [0, 0]
    outcomes = {result_of(url, rank)["outcome"] for rank in range(NUM_RANKS)}
    assert len(outcomes) == 1, outcomes
    check_resumable(url, {3})
    assert [path.name for path in Path(url).iterdir()] == ["step-000000003"]


def fill_the_disk(folder: str) -> None:
    """The second checkpoint does not fit; the third fits after space is freed."""
    url, filler = f"{folder}/checkpoints", Path(folder, "filler")

    def save(group: ProcessGroup) -> None:
        checkpoints = CheckpointManager(url, group, CheckpointConfig())
        checkpoints.save(shard(1, group.rank))
        group.barrier()
        if group.is_first:
            filler.write_bytes(bytes(600_000))
        group.barrier()
        with pytest.raises(UserError, match=r"step-000000002/.*no space left"):
            checkpoints.save(shard(2, group.rank, size=50_000))
        group.barrier()
        assert CheckpointManager(url, group).latest() == (1, [])
        if group.is_first:
            filler.unlink()
        group.barrier()
        checkpoints.save(shard(3, group.rank))

    assert run_on_ranks(save, Path(folder, "rendezvous")) == [0, 0]
    check_resumable(url, {3})
    assert sorted(path.name for path in Path(url).iterdir()) == ["step-000000001", "step-000000003"]


def run(*arguments: object, before: tuple[object, ...] = ()) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [*map(str, before), sys.executable, __file__, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=SECONDS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("watch", "kinds"), [("disk", {"write", "fsync", "os.rename", "os.remove", "os.mkdir"}), ("store", {"before"})]
)
def test_a_complete_checkpoint_is_usable_after_a_fault_at_any_operation(
    tmp_path: Path, watch: str, kinds: set[str]
) -> None:
    result = run("fail_everywhere", tmp_path, watch)
    assert result.returncode == 0, result.stderr[-3000:]
    names = json.loads(result.stdout)
    for of_rank in names.values():
        assert kinds - {"os.remove"} <= {name.split()[0] for name in of_rank} | {"os.mkdir"}
    assert any("COMMITTED" in name for name in names["0"])


@pytest.mark.slow
def test_a_full_disk_leaves_the_previous_checkpoint_and_the_next_succeeds_once_space_is_freed(tmp_path: Path) -> None:
    mount = ["unshare", "--map-root-user", "--mount", "sh", "-c", 'mount -t tmpfs -o size=800k none "$0" && exec "$@"']
    if subprocess.run([*mount, tmp_path, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a small disk in a namespace")
    result = run("fill_the_disk", tmp_path, before=(*mount, tmp_path))
    assert result.returncode == 0, result.stderr[-3000:]


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
    sys.stdout.flush()
    os._exit(0)
