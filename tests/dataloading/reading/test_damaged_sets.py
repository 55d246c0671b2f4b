"""Damaged and malicious sets: every sample is either read as it was stored or reported as bad."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import resource
import shutil
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from dataloading.reading.fetcher import FetchConfig
from dataloading.reading.shard_set import ShardSet
from dataloading.shards.bad_sample import BadSampleError
from dataloading.shards.format import MANIFEST, add_digest, index_name, sha256
from mcl_dist.errors import UserError
from mcl_dist.events import BAD_SAMPLE_REASONS
from tests.support.shard_sets import update_digests

WriteSet = Callable[..., Path]
Files = dict[str, bytes]
Mutation = Callable[[Files, np.random.Generator], None]
NUM_MUTATIONS = 2001
SHARDS = ("shard-000000.tar", "shard-000001.tar")
HARM = "harm-was-done"
ODD_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1.5, 2**31, 2**60, 10**30, "", "x", "../../etc/passwd", "0" * 64, [], [[1]], {}, {"name": 1},
)  # fmt: skip


class Harm:
    """Creates a file when it is unpickled, which must never happen."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, (f"open({str(self._folder / HARM)!r}, 'w').close()",))


def any_of(files: Files, rng: np.random.Generator) -> str:
    return str(rng.choice(sorted(files)))


def flip(files: Files, rng: np.random.Generator) -> None:
    name = any_of(files, rng)
    data = bytearray(files[name])
    for at in rng.integers(0, len(data), rng.integers(1, 9)):
        data[at] ^= int(rng.integers(1, 256))
    files[name] = bytes(data)


def cut(files: Files, rng: np.random.Generator) -> None:
    name = any_of(files, rng)
    files[name] = files[name][: rng.integers(0, len(files[name]))]


def cut_at_a_member(files: Files, rng: np.random.Generator) -> None:
    name = str(rng.choice(SHARDS))
    with tarfile.open(fileobj=io.BytesIO(files[name])) as tar:
        files[name] = files[name][: rng.choice([member.offset for member in tar])]


def blank(files: Files, rng: np.random.Generator) -> None:
    name = any_of(files, rng)
    data = files[name]
    start, size = int(rng.integers(0, len(data))), int(rng.integers(1, 4096))
    files[name] = (data[:start] + bytes(size) + data[start + size :])[: len(data)]


def grow(files: Files, rng: np.random.Generator) -> None:
    name = any_of(files, rng)
    files[name] += rng.bytes(int(rng.integers(1, 2000)))


def shift(files: Files, rng: np.random.Generator) -> None:
    name = any_of(files, rng)
    at = int(rng.integers(0, len(files[name])))
    files[name] = files[name][:at] + rng.bytes(int(rng.integers(1, 600))) + files[name][at:]


def delete(files: Files, rng: np.random.Generator) -> None:
    del files[any_of(files, rng)]


def swap(files: Files, rng: np.random.Generator) -> None:
    one, other = rng.choice(sorted(files), 2, replace=False).tolist()
    files[one], files[other] = files[other], files[one]


def bomb(files: Files, rng: np.random.Generator) -> None:
    files[any_of(files, rng)] = ZEROS if rng.random() < 0.5 else gzip.compress(bytes(10**6))


def retar(files: Files, rng: np.random.Generator) -> None:
    """Members that are missing, duplicated, renamed, reordered, links, or huge by their header."""
    name = str(rng.choice(SHARDS))
    out = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(files[name])) as tar, tarfile.open(fileobj=out, mode="w") as new:
        members = [(member, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
        chosen = int(rng.integers(len(members)))
        change = rng.choice(["lost", "doubled", "outside", "absolute", "link", "huge", "order"])
        if change == "order":
            rng.shuffle(members)  # type: ignore[arg-type]
        for number, (member, data) in enumerate(members):
            if number == chosen and change == "lost":
                continue
            if number == chosen and change in ("outside", "absolute"):
                member.name = f"{'../' * 3 if change == 'outside' else '/tmp/'}{HARM}"
            if number == chosen and change == "link":
                member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
            for _ in range(1 + (number == chosen and change == "doubled")):
                new.addfile(member, io.BytesIO(data))
    data = bytearray(out.getvalue())
    if change == "huge":
        data[124:136] = b"77777777777\0"
    files[name] = bytes(data)


def rewrite_manifest(files: Files, rng: np.random.Generator) -> None:
    """Another value under any key, with a matching digest."""
    tree = json.loads(files[MANIFEST])
    target = tree if rng.random() < 0.3 else tree["shards"][int(rng.integers(2))]
    key = str(rng.choice(sorted(target)))
    target[key] = ODD_VALUES[int(rng.integers(len(ODD_VALUES)))]
    if isinstance(tree["shards"], list) and rng.random() < 0.5:
        for total, field in (("videos", "samples"), ("frames", "frames"), ("bytes", "bytes")):
            values = [shard.get(field) if isinstance(shard, dict) else 0 for shard in tree["shards"]]
            if isinstance(tree["totals"], dict) and all(isinstance(value, int) for value in values):
                tree["totals"][total] = sum(values)
    files[MANIFEST] = add_digest(tree)


def deep_manifest(files: Files, rng: np.random.Generator) -> None:
    files[MANIFEST] = b"[" * 10**5 if rng.random() < 0.5 else b'{"format":' * 10**5


def set_index(files: Files, shard: str, data: bytes) -> None:
    files[index_name(shard)] = data
    tree = json.loads(files[MANIFEST])
    for entry in tree["shards"]:
        if entry["name"] == shard:
            entry["index_sha256"] = sha256(data)
    files[MANIFEST] = add_digest(tree)


def rewrite_index(files: Files, rng: np.random.Generator) -> None:
    """Another number or key in the index, with a matching digest."""
    shard = str(rng.choice(SHARDS))
    with np.load(io.BytesIO(files[index_name(shard)])) as old:
        arrays = {name: old[name].copy() for name in old.files}
    # Other labels would only make another valid set; offsets, sizes and counts can do harm.
    name = str(rng.choice(sorted(set(arrays) - {"labels"})))
    array = arrays[name]
    if name == "keys":
        arrays[name] = array.astype("<U40")
        arrays[name][0] = str(rng.choice(["../../x", "/etc/passwd", "a.b", "", "ä", "x\n"]))
    else:
        odd = [0, 1, 2**31, 2**62, 2**63 - 1] if name.endswith("crcs") else [-1, 0, 2**31, 2**62, 2**63 - 1, -(2**63)]
        array.reshape(-1)[int(rng.integers(array.size))] = np.array(rng.choice(odd)).astype(array.dtype)
        if rng.random() < 0.2:
            arrays[name] = array[..., None] if rng.random() < 0.5 else array.astype(np.float64)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    set_index(files, shard, buffer.getvalue())


def harmful_index(files: Files, rng: np.random.Generator) -> None:
    """Compressed tables, tables of objects, headers with huge shapes, foreign files."""
    shard = str(rng.choice(SHARDS))
    out = io.BytesIO()
    kind = rng.choice(["zeros", "objects", "shape", "foreign", "noise", "lost"])
    with zipfile.ZipFile(io.BytesIO(files[index_name(shard)])) as old, zipfile.ZipFile(out, "w") as new:
        chosen = str(rng.choice(old.namelist()))
        for name in old.namelist():
            data = old.read(name)
            if name == chosen and kind == "lost":
                continue
            if name == chosen and kind == "zeros":
                new.writestr(name, bytes(10**7), zipfile.ZIP_DEFLATED)
                continue
            if name == chosen and kind == "objects":
                data = OBJECTS
            if name == chosen and kind == "shape":
                data = data.replace(b"'shape': (", b"'shape': (99999999999, ", 1)
            new.writestr(name, data)
        if kind == "foreign":
            new.writestr(f"../../{HARM}", b"x")
    data = bytearray(out.getvalue())
    if kind == "noise":
        for at in rng.integers(0, len(data), 5):
            data[at] ^= 255
    set_index(files, shard, bytes(data))


def harmful_members(files: Files, rng: np.random.Generator) -> None:
    """Pickles, and images or arrays of huge sizes, with matching checksums."""
    shard = str(rng.choice(SHARDS))
    with np.load(io.BytesIO(files[index_name(shard)])) as index:
        members, stills = index["members"], index["frame_stills"]
    data = bytearray(files[shard])
    kind = rng.choice(["image", "pickle", "objects", "shape", "deep"])
    if kind == "image":
        offset, size = stills[int(rng.integers(len(stills)))].tolist()
        header = data.index(b"\xff\xc0", offset, offset + size)
        data[header + 5 : header + 9] = b"\xff\xff\xff\xff"
    else:
        member = 0 if kind == "deep" else int(rng.integers(3, 5))
        offset, size = members[int(rng.integers(len(members))), member].tolist()
        shape = bytes(data[offset : offset + size]).replace(b"'shape': (", b"'shape': (99999999999, ", 1)
        new = {"pickle": PICKLE, "objects": OBJECTS, "shape": shape, "deep": b"[" * size}[str(kind)]
        data[offset : offset + size] = new[:size].ljust(size, b"\n")
    files[shard] = bytes(data)
    files[UPDATE_DIGESTS] = b""


UPDATE_DIGESTS = "update-digests"  # a mark for the test: recompute the digests
PICKLE = OBJECTS = ZEROS = b""  # set by the test, for its folder
MUTATIONS: tuple[Mutation, ...] = (
    flip, flip, flip, cut, cut_at_a_member, blank, grow, shift, delete, swap, bomb, retar, retar,
    rewrite_manifest, rewrite_manifest, deep_manifest, rewrite_index, rewrite_index, harmful_index, harmful_members,
)  # fmt: skip


def sample(shards: ShardSet, position: int) -> tuple[Any, ...]:
    """Everything that is stored of a video."""
    video = shards.read(position)
    stills = [part.tobytes() for part in (*video.frames(range(video.num_frames)), *video.flow(range(video.num_frames)))]
    sizes = (video.height, video.width, video.flow_height, video.flow_width)
    return stills, sizes, video.frame_maps.tobytes(), video.clip_scores.tobytes(), video.info()


def outcome(shards: ShardSet, position: int, expected: Any) -> str:
    """`as stored`, or why the sample was rejected; any other outcome fails the test."""
    try:
        found = sample(shards, position)
    except BadSampleError as error:
        return error.reason if error.key == shards.keys[position] else "of another sample"
    except UserError as error:
        return "set rejected" if "index.npz" in str(error) else "something else"
    return "as stored" if found == expected else "unreported"


def outcomes(url: str, cache: Path | None, fetch: str, expected: list[Any], keys: list[str]) -> Counter[str]:
    """Number of samples by outcome."""
    try:
        shards = ShardSet(url, None if cache is None else str(cache), FetchConfig(fetch=fetch))
    except UserError as error:
        return Counter(["set rejected" if "\n" not in str(error) else "more than one line"])
    if shards.keys.tolist() != keys:
        return Counter(["other keys"])
    found = Counter(outcome(shards, position, expected[position]) for position in range(len(shards)))
    shards.close()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("way", ["in place", "whole", "ranges"])
def test_2000_mutated_sets_yield_no_unreported_damage_and_do_no_harm(
    write_set: WriteSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr("mcl_dist.storage.store_requests.FIRST_WAIT", 0.0)
    monkeypatch.setitem(globals(), "PICKLE", pickle.dumps(Harm(tmp_path)))
    objects = io.BytesIO()
    np.save(objects, np.array([Harm(tmp_path)], dtype=object), allow_pickle=True)
    monkeypatch.setitem(globals(), "OBJECTS", objects.getvalue())
    monkeypatch.setitem(globals(), "ZEROS", gzip.compress(bytes(2**26), 1))
    folder = write_set([3, 4, 3], window=3, per_shard=2, size=(16, 24), flow_size=(8, 8))
    original = {path.name: path.read_bytes() for path in folder.iterdir()}
    whole = ShardSet(str(folder))
    expected, keys = [sample(whole, position) for position in range(3)], whole.keys.tolist()
    memory = fsspec.filesystem("memory")
    found: Counter[str] = Counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    for seed in range(("in place", "whole", "ranges").index(way), NUM_MUTATIONS, 3):
        files, rng = dict(original), np.random.default_rng(seed)
        MUTATIONS[int(rng.integers(len(MUTATIONS)))](files, rng)
        for path in folder.iterdir():
            path.unlink()
        for name, data in files.items():
            (folder / name).write_bytes(data)
        if files.pop(UPDATE_DIGESTS, None) is not None:
            (folder / UPDATE_DIGESTS).unlink()
            update_digests(folder)
        url, cache = str(folder), None
        if way != "in place":
            url, cache = f"memory://{tmp_path.name}", tmp_path / "cache"
            memory.pipe({f"/{tmp_path.name}/{path.name}": path.read_bytes() for path in folder.iterdir()})
        found += outcomes(url, cache, way if cache else "whole", expected, keys)
        if cache:
            memory.rm(f"/{tmp_path.name}", recursive=True)
            shutil.rmtree(cache, ignore_errors=True)

    assert found.keys() <= {"as stored", "set rejected", *BAD_SAMPLE_REASONS}
    assert not list(tmp_path.parent.rglob(f"*{HARM}*"))
    assert {path.name for path in tmp_path.iterdir()} <= {"set", "cache"}
    assert not Path("/tmp", HARM).exists()
    # ru_maxrss is in KiB: no memory was allocated for the sizes in forged headers.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19
    assert found["as stored"] > 300
    assert min(found[kind] for kind in ("set rejected", "checksum", "missing", "size", "maps")) > 0
