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


def filling(size: int = SIZE, calls: list[int] | None = None) -> Fill:
    def fill(descriptor: int) -> bool:
        if calls is not None:
            calls.append(descriptor)
        os.pwrite(descriptor, b"x" * size, 0)
        return True

    return fill


def opened(cache: ShardCache, name: str, size: int = SIZE) -> LockedFile:
    return cache.open(name, size, filling(size))


def kept(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.tar")}


def fewest_misses(sequence: Sequence[str], room: int) -> int:
    """Of all ways to choose what to evict."""

    @functools.cache
    def misses(place: int, held: frozenset[str]) -> int:
        if place == len(sequence):
            return 0
        wanted = sequence[place]
        if wanted in held:
            return misses(place + 1, held)
        if len(held) < room:
            return 1 + misses(place + 1, held | {wanted})
        return 1 + min(misses(place + 1, held - {victim} | {wanted}) for victim in held)

    return misses(0, frozenset())


@pytest.mark.parametrize("room", [2, 3])
def test_eviction_by_next_use_misses_as_rarely_as_the_best_of_all_choices(tmp_path: Path, room: int) -> None:
    for seed in range(30):
        names = np.random.default_rng(seed).choice(list("abcdef"), 14).tolist()
        report = ReadCounters()
        cache = ShardCache(tmp_path / str(seed), room * SIZE + 1, report)
        for place, name in enumerate(names):
            cache.expect(names[place + 1 :])
            opened(cache, name).close()
        counters = report.counters()
        assert counters["cache_misses"] == fewest_misses(names, room)
        assert counters["cache_hits"] == len(names) - counters["cache_misses"]
        assert counters["cache_evictions"] == counters["cache_misses"] - len(kept(tmp_path / str(seed)))
        cache.close()


def test_of_files_that_nobody_expects_the_one_not_used_for_longest_goes_first(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 3 * SIZE, ReadCounters())
    for age, name in enumerate("abc"):
        opened(cache, name).close()
        os.utime(tmp_path / f"{name}.tar", (age, age))
    opened(cache, "a").close()
    opened(cache, "d").close()
    assert kept(tmp_path) == {"a", "c", "d"}


def test_what_another_process_expects_is_kept_for_it_until_it_ends(tmp_path: Path) -> None:
    cache, other = (ShardCache(tmp_path, 2 * SIZE, ReadCounters()) for _ in range(2))
    opened(cache, "theirs").close()
    opened(cache, "ours").close()
    other.expect(["theirs"])
    opened(cache, "new").close()
    assert kept(tmp_path) == {"theirs", "new"}
    other.close()
    cache.expect(["new"])
    opened(cache, "newer").close()
    assert kept(tmp_path) == {"new", "newer"}


def test_what_is_being_read_is_never_evicted_and_alone_exceeds_the_limit(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sizes = {f"file-{number}": int(rng.integers(1, 60)) for number in range(12)}
    cache = ShardCache(tmp_path, 100, ReadCounters())
    reading: dict[str, LockedFile] = {}
    for name in rng.choice(list(sizes), 400).tolist():
        if name in reading:
            reading.pop(name).close()
            continue
        is_new = not cache.holds(name)
        reading[name] = opened(cache, name, sizes[name])
        held = {path.stem: path.stat().st_size for path in tmp_path.glob("*.tar")}
        assert reading.keys() <= held.keys()
        in_use = sum(sizes[one] for one in reading)
        assert sum(held.values()) <= (max(100, in_use) if is_new else 100 + in_use)
        if in_use > 150:
            reading.pop(next(iter(reading))).close()


def test_nothing_is_fetched_ahead_in_the_place_of_what_is_needed_sooner(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 2 * SIZE, ReadCounters())
    cache.expect(["first", "second", "third"])
    assert cache.fetch_ahead("first", SIZE, filling())
    assert cache.fetch_ahead("second", SIZE, filling())
    assert not cache.fetch_ahead("third", SIZE, filling())
    assert kept(tmp_path) == {"first", "second"}
    cache.expect(["second", "third"])
    assert cache.fetch_ahead("third", SIZE, filling())
    assert kept(tmp_path) == {"second", "third"}


def test_who_comes_while_a_file_is_fetched_waits_for_it_and_does_not_fetch_again(tmp_path: Path) -> None:
    calls: list[int] = []
    started, go_on = threading.Event(), threading.Event()

    def slow(descriptor: int) -> bool:
        started.set()
        go_on.wait(30)
        return filling(calls=calls)(descriptor)

    caches = [ShardCache(tmp_path, 2 * SIZE, ReadCounters()) for _ in range(4)]
    files: list[LockedFile] = []
    threads = [threading.Thread(target=lambda one=one: files.append(one.open("a", SIZE, slow))) for one in caches]
    threads[0].start()
    started.wait(30)
    for thread in threads[1:]:
        thread.start()
    go_on.set()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert [os.pread(file.descriptor, SIZE, 0) for file in files] == [b"x" * SIZE] * 4
    assert not list(tmp_path.glob(f"*{PARTIAL}"))


def test_a_fetch_that_fails_leaves_nothing(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, SIZE, ReadCounters())

    def failing(descriptor: int) -> bool:
        os.pwrite(descriptor, b"half", 0)
        raise UserError("the store is down")

    with pytest.raises(UserError, match="the store is down"):
        cache.open("a", SIZE, failing)
    assert not cache.holds("a")
    assert not list(tmp_path.glob("a*"))


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=f"^{tmp_path}/file/cache: "):
        ShardCache(tmp_path / "file" / "cache", None, ReadCounters())


def test_a_child_that_is_forked_does_not_keep_its_parents_locks(tmp_path: Path) -> None:
    script = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from dataloading.reading.file_lock import locked\n"
        "path = Path(sys.argv[1])\n"
        "first = locked(path, create=True)\n"
        "told, tell = os.pipe()\n"
        "go_on, let_go = os.pipe()\n"
        "if not (child := os.fork()):\n"
        "    os.write(tell, b'x')\n"
        "    os.read(go_on, 1)\n"
        "    os._exit(0)\n"
        "os.read(told, 1)\n"
        "held = locked(path, wait=False) is None\n"
        "first.close()\n"
        "free = locked(path, wait=False) is not None\n"
        "os.write(let_go, b'x')\n"
        "os.waitpid(child, 0)\n"
        "print(held, free)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "lock"], check=True, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "True True\n"


@pytest.mark.slow
def test_sixty_processes_killed_while_they_fetch_leave_a_valid_cache(tmp_path: Path) -> None:
    """`killed_fetchers.py` kills them and looks at the cache after each."""
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
