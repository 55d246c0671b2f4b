from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from dataloading.reading.file_lock import LockedFile
from dataloading.reading.read_counters import ReadCounters
from dataloading.reading.shard_cache import DAMAGED, NEXT, PARTIAL, Fill, ShardCache
from mcl_dist.errors import UserError
from tests.support.paths import REPOSITORY

SIZE = 100


def fill_with(size: int = SIZE, calls: list[int] | None = None) -> Fill:
    def fill(descriptor: int) -> bool:
        if calls is not None:
            calls.append(descriptor)
        os.pwrite(descriptor, b"x" * size, 0)
        return True

    return fill


def open_file(cache: ShardCache, name: str, size: int = SIZE) -> LockedFile:
    return cache.open(name, size, fill_with(size))


def cached(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.tar")}


def fewest_misses(sequence: Sequence[str], capacity: int) -> int:
    """Misses of the optimal eviction policy."""

    @functools.cache
    def misses(position: int, held: frozenset[str]) -> int:
        if position == len(sequence):
            return 0
        wanted = sequence[position]
        if wanted in held:
            return misses(position + 1, held)
        if len(held) < capacity:
            return 1 + misses(position + 1, held | {wanted})
        return 1 + min(misses(position + 1, held - {victim} | {wanted}) for victim in held)

    return misses(0, frozenset())


@pytest.mark.parametrize("capacity", [2, 3])
def test_eviction_by_next_use_has_as_few_misses_as_the_optimal_policy(tmp_path: Path, capacity: int) -> None:
    for seed in range(30):
        names = np.random.default_rng(seed).choice(list("abcdef"), 14).tolist()
        read_counters = ReadCounters()
        cache = ShardCache(tmp_path / str(seed), capacity * SIZE + 1, read_counters)
        for position, name in enumerate(names):
            cache.expect(names[position + 1 :])
            open_file(cache, name).close()
        counters = read_counters.snapshot()
        assert counters["cache_misses"] == fewest_misses(names, capacity)
        assert counters["cache_hits"] == len(names) - counters["cache_misses"]
        assert counters["cache_evictions"] == counters["cache_misses"] - len(cached(tmp_path / str(seed)))
        cache.close()


def test_of_unexpected_files_the_least_recently_used_is_evicted_first(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 3 * SIZE, ReadCounters())
    for age, name in enumerate("abc"):
        open_file(cache, name).close()
        os.utime(tmp_path / f"{name}.tar", (age, age))
    open_file(cache, "a").close()
    open_file(cache, "d").close()
    assert cached(tmp_path) == {"a", "c", "d"}


def test_files_that_another_process_expects_are_kept_until_it_ends(tmp_path: Path) -> None:
    cache, other = (ShardCache(tmp_path, 2 * SIZE, ReadCounters()) for _ in range(2))
    open_file(cache, "theirs").close()
    open_file(cache, "ours").close()
    other.expect(["theirs"])
    open_file(cache, "new").close()
    assert cached(tmp_path) == {"theirs", "new"}
    other.close()
    cache.expect(["new"])
    open_file(cache, "newer").close()
    assert cached(tmp_path) == {"new", "newer"}


def test_only_files_in_use_exceed_the_limit_and_they_are_never_evicted(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sizes = {f"file-{number}": int(rng.integers(1, 60)) for number in range(12)}
    cache = ShardCache(tmp_path, 100, ReadCounters())
    reading: dict[str, LockedFile] = {}
    for name in rng.choice(list(sizes), 400).tolist():
        if name in reading:
            reading.pop(name).close()
            continue
        is_new = not cache.holds(name)
        reading[name] = open_file(cache, name, sizes[name])
        held = {path.stem: path.stat().st_size for path in tmp_path.glob("*.tar")}
        assert reading.keys() <= held.keys()
        in_use = sum(sizes[name] for name in reading)
        assert sum(held.values()) <= (max(100, in_use) if is_new else 100 + in_use)
        if in_use > 150:
            reading.pop(next(iter(reading))).close()


def test_prefetching_never_evicts_a_file_that_is_needed_sooner(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 2 * SIZE, ReadCounters())
    cache.expect(["first", "second", "third"])
    assert cache.fetch_ahead("first", SIZE, fill_with())
    assert cache.fetch_ahead("second", SIZE, fill_with())
    assert not cache.fetch_ahead("third", SIZE, fill_with())
    assert cached(tmp_path) == {"first", "second"}
    cache.expect(["second", "third"])
    assert cache.fetch_ahead("third", SIZE, fill_with())
    assert cached(tmp_path) == {"second", "third"}


def test_concurrent_readers_wait_for_one_fetch(tmp_path: Path) -> None:
    calls: list[int] = []
    started, released = threading.Event(), threading.Event()

    def slow(descriptor: int) -> bool:
        started.set()
        released.wait(30)
        return fill_with(calls=calls)(descriptor)

    caches = [ShardCache(tmp_path, 2 * SIZE, ReadCounters()) for _ in range(4)]
    files: list[LockedFile] = []
    threads = [
        threading.Thread(target=lambda cache=cache: files.append(cache.open("a", SIZE, slow))) for cache in caches
    ]
    threads[0].start()
    started.wait(30)
    for thread in threads[1:]:
        thread.start()
    released.set()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert [os.pread(file.descriptor, SIZE, 0) for file in files] == [b"x" * SIZE] * 4
    assert not list(tmp_path.glob(f"*{PARTIAL}"))


def test_a_failed_fetch_leaves_no_file(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, SIZE, ReadCounters())

    def failing(descriptor: int) -> bool:
        os.pwrite(descriptor, b"half", 0)
        raise UserError("the store is down")

    with pytest.raises(UserError, match="the store is down"):
        cache.open("a", SIZE, failing)
    assert not cache.holds("a")
    assert not list(tmp_path.glob("a*"))


def test_an_unusable_cache_folder_is_an_error_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=f"^{tmp_path}/file/cache: "):
        ShardCache(tmp_path / "file" / "cache", None, ReadCounters())


def test_a_forked_child_does_not_keep_the_locks_of_its_parent(tmp_path: Path) -> None:
    script = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from dataloading.reading.file_lock import lock_file\n"
        "path = Path(sys.argv[1])\n"
        "first = lock_file(path, create=True)\n"
        "started, start = os.pipe()\n"
        "released, release = os.pipe()\n"
        "if not (child := os.fork()):\n"
        "    os.write(start, b'x')\n"
        "    os.read(released, 1)\n"
        "    os._exit(0)\n"
        "os.read(started, 1)\n"
        "held = lock_file(path, wait=False) is None\n"
        "first.close()\n"
        "free = lock_file(path, wait=False) is not None\n"
        "os.write(release, b'x')\n"
        "os.waitpid(child, 0)\n"
        "print(held, free)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "lock"], check=True, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "True True\n"


@pytest.mark.slow
def test_sixty_processes_killed_during_a_fetch_leave_a_valid_cache(tmp_path: Path) -> None:
    """`killed_fetchers.py` kills them and checks the cache after each kill."""
    program = REPOSITORY / "tests" / "support" / "killed_fetchers.py"
    done = subprocess.run(
        [sys.executable, program, tmp_path, "60"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert done.returncode == 0, done.stderr
    kills, half_written = map(int, done.stdout.split())
    assert kills == 60
    assert half_written >= 5
    ShardCache(tmp_path / "cache", None, ReadCounters()).close()
    for path in (tmp_path / "cache").iterdir():
        assert path.suffix not in (PARTIAL, NEXT, DAMAGED)
        if path.suffix == ".tar":
            assert hashlib.sha256(path.read_bytes()).hexdigest() == path.stem
