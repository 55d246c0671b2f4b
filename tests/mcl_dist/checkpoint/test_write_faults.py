"""Two ranks that save a checkpoint, and one of them dies or fails at every single operation of it."""

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


class Operations:
    """Counts what the writing thread does to the disk or the store, and strikes at one of them.

    Args:
        strike: what happens at operation `at`, counted from 1.
    """

    def __init__(self, at: int, strike: Callable[[], None]) -> None:
        self.names: list[str] = []
        self.at, self._strike = at, strike

    def meet(self, name: str) -> bool:
        """Take note of an operation about to happen; whether it is the one to strike at."""
        if threading.current_thread().name != "checkpoint":
            return False
        self.names.append(name)
        return len(self.names) == self.at

    def plain(self, name: str) -> None:
        if self.meet(name):
            self._strike()

    def on_disk(self) -> None:
        """Watch every write, sync, rename, removal and new folder."""

        def audited(event: str, arguments: tuple[Any, ...]) -> None:
            if event in CHANGING:
                self.plain(f"{event} {Path(os.fsdecode(arguments[0])).name}")

        def write_bytes(path: Path, data: bytes | memoryview) -> int:
            struck = self.meet(f"write {path.name}")
            with path.open("wb") as file:
                file.write(data[: len(data) // 2] if struck else data)
            if struck:
                self._strike()
            return len(data)

        def fsync(descriptor: int, sync: Callable[[int], None] = os.fsync) -> None:
            self.plain("fsync")
            sync(descriptor)

        sys.addaudithook(audited)
        Path.write_bytes = write_bytes  # type: ignore[method-assign, assignment]
        os.fsync = fsync

    def in_store(self) -> None:
        """Watch every put and removal, before the store has it and after."""
        ask = storage.asked

        def asked(filesystem: Any, method: str, *arguments: Any, **how: Any) -> Any:
            if method not in ("pipe_file", "rm"):
                return ask(filesystem, method, *arguments, **how)
            self.plain(f"before {method} {arguments[0]}")
            result = ask(filesystem, method, *arguments, **how)
            self.plain(f"after {method} {arguments[0]}")
            return result

        storage.asked = asked


def share(step: int, rank: int, size: int = 5) -> CheckpointShard:
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
    """Let local folders be taken for a store whose files appear whole."""
    from fsspec.implementations.local import LocalFileSystem

    storage.Folder.is_local = property(lambda _: False)  # type: ignore[method-assign, assignment]
    storage.connected = lambda url: (LocalFileSystem(auto_mkdir=True), url)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise OSError(errno.EIO, "planted")


def ranks_do(work: Callable[[ProcessGroup], None], meeting: Path) -> list[int]:
    """Fork the ranks; their exit statuses."""
    children = []
    for rank in range(NUM_RANKS):
        child = os.fork()
        if not child:
            _as_rank(work, rank, meeting)
        children.append(child)
    statuses = [os.waitpid(child, 0)[1] for child in children]
    meeting.unlink(missing_ok=True)
    return statuses


def _as_rank(work: Callable[[ProcessGroup], None], rank: int, meeting: Path) -> NoReturn:
    try:
        distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=NUM_RANKS)
        work(ProcessGroup())
    except BaseException as error:
        print(f"rank {rank}: {error!r}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def save_one(url: str, group: ProcessGroup) -> None:
    CheckpointManager(url, group, SETTINGS).save(share(1, group.rank))


def save_struck(url: str, victim: int, at: int, kind: str, watch: str, group: ProcessGroup) -> None:
    """Save a second checkpoint; the victim is struck. Who lives and was not left alone saves a third."""
    checkpoints = CheckpointManager(url, group, SETTINGS)
    operations = Operations(at if group.rank == victim else 0, kill if kind == "kill" else fail)
    operations.on_disk() if watch == "disk" else operations.in_store()
    outcome = "written"
    try:
        checkpoints.save(share(2, group.rank))
    except UserError as error:
        outcome = str(error)
    Path(f"{url}.{group.rank}.json").write_text(json.dumps({"names": operations.names, "outcome": outcome}))
    operations.at = 0
    if kind == "error":
        checkpoints.save(share(3, group.rank))


def told(url: str, rank: int) -> dict[str, Any]:
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


def strike_everywhere(folder: str, watch: str) -> None:
    """Every operation of either rank, killed and failing; prints how many there were."""
    root = Path(folder)
    if watch == "store":
        as_object_store()
    first = root / "first"
    assert ranks_do(partial(save_one, str(first)), root / "meeting") == [0, 0]
    traced = shutil.copytree(first, root / "traced")
    assert ranks_do(partial(save_struck, str(traced), 0, 0, "none", watch), root / "meeting") == [0, 0]
    counts = [len(told(str(traced), rank)["names"]) for rank in range(NUM_RANKS)]
    print(json.dumps({str(rank): told(str(traced), rank)["names"] for rank in range(NUM_RANKS)}))
    for victim in range(NUM_RANKS):
        for at in range(1, counts[victim] + 2):  # one more: either rank may be the one to make the folder
            for kind in ("kill", "error"):
                url = shutil.copytree(first, root / f"{victim}-{at}-{kind}")
                statuses = ranks_do(partial(save_struck, str(url), victim, at, kind, watch), root / "meeting")
                place = f"rank {victim}, {kind} at {at} of {told(str(traced), victim)['names']}"
                try:
                    check_struck(str(url), victim, kind, statuses)
                except AssertionError as error:
                    raise AssertionError(f"{place}: {error}") from error
                shutil.rmtree(url)


def check_struck(url: str, victim: int, kind: str, statuses: list[int]) -> None:
    if kind == "kill":
        assert statuses[1 - victim] == 0
        assert statuses[victim] == signal.SIGKILL or told(url, victim)["outcome"] == "written"
        check_resumable(url, {1, 2})
        return
    assert statuses == [0, 0]
    outcomes = {told(url, rank)["outcome"] for rank in range(NUM_RANKS)}
    assert len(outcomes) == 1, outcomes
    check_resumable(url, {3})
    assert [path.name for path in Path(url).iterdir()] == ["step-000000003"]


def fill_the_disk(folder: str) -> None:
    """The second checkpoint does not fit; the third does once there is room."""
    url, filler = f"{folder}/checkpoints", Path(folder, "filler")

    def save(group: ProcessGroup) -> None:
        checkpoints = CheckpointManager(url, group, CheckpointConfig())
        checkpoints.save(share(1, group.rank))
        group.barrier()
        if group.is_first:
            filler.write_bytes(bytes(600_000))
        group.barrier()
        with pytest.raises(UserError, match=r"step-000000002/.*no space left"):
            checkpoints.save(share(2, group.rank, size=50_000))
        group.barrier()
        assert CheckpointManager(url, group).latest() == (1, [])
        if group.is_first:
            filler.unlink()
        group.barrier()
        checkpoints.save(share(3, group.rank))

    assert ranks_do(save, Path(folder, "meeting")) == [0, 0]
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
def test_whatever_operation_of_saving_is_the_last_a_complete_checkpoint_is_resumed(
    tmp_path: Path, watch: str, kinds: set[str]
) -> None:
    result = run("strike_everywhere", tmp_path, watch)
    assert result.returncode == 0, result.stderr[-3000:]
    names = json.loads(result.stdout)
    for of_rank in names.values():
        assert kinds - {"os.remove"} <= {name.split()[0] for name in of_rank} | {"os.mkdir"}
    assert any("COMMITTED" in name for name in names["0"])


@pytest.mark.slow
def test_a_checkpoint_that_does_not_fit_on_the_disk_leaves_the_one_before_and_room_lets_the_next_one_in(
    tmp_path: Path,
) -> None:
    mount = ["unshare", "--map-root-user", "--mount", "sh", "-c", 'mount -t tmpfs -o size=800k none "$0" && exec "$@"']
    if subprocess.run([*mount, tmp_path, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a small disk in a namespace")
    result = run("fill_the_disk", tmp_path, before=(*mount, tmp_path))
    assert result.returncode == 0, result.stderr[-3000:]


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
    sys.stdout.flush()
    os._exit(0)
