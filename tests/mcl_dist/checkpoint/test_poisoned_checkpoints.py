"""Malicious checkpoints: each is rejected with a reason, and the previous good one is used."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save as to_bytes

from mcl_dist.checkpoint import CheckpointConfig, CheckpointManager, CheckpointShard, read_snapshot
from mcl_dist.checkpoint.writer import expired
from mcl_dist.distributed.process_group import ProcessGroup
from mcl_dist.errors import UserError


class Code:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.path,)


def shard(step: int) -> CheckpointShard:
    network = {"weight": torch.full((2, 3), float(step))}
    return CheckpointShard(
        step,
        network=network,
        momentum=network,
        optimizer={"momentum_buffer/weight@0": torch.zeros(6)},
        queue=torch.zeros(4, 2),
        statistics={"query.mean": torch.zeros(2)},
    )


def commit(folder: Path, **changes: bytes) -> None:
    """Change some files, then write `COMMITTED` for all, as anyone with write access could."""
    for name, data in changes.items():
        (folder / name.replace("__", "-").replace("_safetensors", ".safetensors")).write_bytes(data)
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "COMMITTED"}
    digests = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    (folder / "COMMITTED").write_text(json.dumps({"files": digests}))


def with_pickle(folder: Path) -> None:
    commit(folder, network_safetensors=pickle.dumps(Code(folder.parent / "ran")))


def with_path_traversal(folder: Path) -> None:
    (folder.parent / "secret").write_text("x")
    committed = json.loads((folder / "COMMITTED").read_text())
    committed["files"]["../secret"] = {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    (folder / "COMMITTED").write_text(json.dumps(committed))


def with_wrong_digest(folder: Path) -> None:
    data = bytearray((folder / "network.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "network.safetensors").write_bytes(data)


def with_wrong_shapes(folder: Path) -> None:
    commit(folder, network_safetensors=to_bytes({"weight": torch.zeros(3, 3)}))


def with_enormous_header(folder: Path) -> None:
    commit(folder, network_safetensors=(2**62).to_bytes(8, "little") + b"{}")


def with_offsets_outside(folder: Path) -> None:
    header = json.dumps({"weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 2**40]}}).encode()
    commit(folder, network_safetensors=len(header).to_bytes(8, "little") + header)


def with_missing_pieces(folder: Path) -> None:
    piece = {"momentum_buffer/weight@3": torch.zeros(3)}
    commit(folder, optimizer__00000_safetensors=to_bytes(piece))


def with_deep_json(folder: Path) -> None:
    (folder / "COMMITTED").write_bytes(b'{"files":' * 100_000)


def with_huge_json(folder: Path) -> None:
    (folder / "COMMITTED").write_bytes(b" " * (2**24 + 1))


def with_many_ranks(folder: Path) -> None:
    state = json.loads((folder / "state.json").read_text()) | {"ranks": 10**9}
    (folder / "state.json").write_text(json.dumps(state))
    commit(folder)


def with_queue_position_outside(folder: Path) -> None:
    state = json.loads((folder / "state.json").read_text()) | {"queue_position": 4}
    (folder / "state.json").write_text(json.dumps(state))
    commit(folder)


def of_another_step(folder: Path) -> None:
    state = json.loads((folder / "state.json").read_text()) | {"step": 10**8}
    (folder / "state.json").write_text(json.dumps(state))
    commit(folder)


POISONS = [
    (with_pickle, "network.safetensors"),
    (with_path_traversal, "names '../secret'"),
    (with_wrong_digest, "does not match its size and digest"),
    (with_wrong_shapes, "not of one shape"),
    (with_enormous_header, "announces a header of"),
    (with_offsets_outside, "not readable as safetensors"),
    (with_missing_pieces, "has not all of"),
    (with_deep_json, "not JSON"),
    (with_huge_json, "larger than"),
    (with_many_ranks, "ranks 1000000000"),
    (with_queue_position_outside, "4 of 4"),
    (of_another_step, "step 100000000"),
]


@pytest.mark.parametrize(("poison", "reason"), POISONS)
def test_a_poisoned_checkpoint_is_rejected_and_the_previous_good_one_used(
    tmp_path: Path, poison: Callable[[Path], None], reason: str
) -> None:
    manager = CheckpointManager(str(tmp_path), ProcessGroup(), CheckpointConfig(keep=1))
    manager.save(shard(1))
    keeping = CheckpointManager(str(tmp_path), ProcessGroup(), CheckpointConfig(keep=9))
    url = keeping.save(shard(2))
    poison(Path(url))
    step, (rejected,) = keeping.latest()
    assert step == 1
    assert rejected.url == url
    assert reason in rejected.reason
    assert not (tmp_path / "ran").exists()
    with pytest.raises(UserError, match="name another checkpoint"):
        read_snapshot(url)


def test_a_run_does_not_start_over_if_no_complete_checkpoint_is_usable(tmp_path: Path) -> None:
    manager = CheckpointManager(str(tmp_path), ProcessGroup())
    with_wrong_digest(Path(manager.save(shard(1))))
    with pytest.raises(UserError, match="none of 1 checkpoints can be used"):
        manager.latest()


def test_a_rejected_checkpoint_is_not_removed_and_does_not_count_as_kept(tmp_path: Path) -> None:
    manager = CheckpointManager(str(tmp_path), ProcessGroup(), CheckpointConfig(keep=9))
    manager.save(shard(1))
    with_wrong_digest(Path(manager.save(shard(5))))
    resumed = CheckpointManager(str(tmp_path), ProcessGroup(), CheckpointConfig(keep=1))
    assert resumed.latest()[0] == 1
    resumed.save(shard(2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000002", "step-000000005"]


def test_the_newest_steps_and_multiples_of_keep_every_do_not_expire() -> None:
    assert expired(range(1, 11), keep=2, keep_every=None) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert expired(range(1, 11), keep=2, keep_every=4) == [1, 2, 3, 5, 6, 7]


def test_too_many_failed_checkpoints_in_a_row_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = CheckpointManager(str(tmp_path), ProcessGroup(), CheckpointConfig(max_failures=2))

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    for step in (1, 2):
        manager.begin_save(shard(step), since=0.0)
        manager.join()
    with pytest.raises(UserError, match="2 checkpoints in a row could not be written"):
        manager.begin_save(shard(3), since=0.0)
    assert [(event.step, event.in_a_row) for event in manager.pop_events()] == [(1, 1), (2, 2)]
