"""Checkpoints that mean harm: each is refused with its reason, and the good one before it is resumed."""

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
from mcl_dist.checkpoint.retention import leaving
from mcl_dist.distributed.process_group import ProcessGroup
from mcl_dist.errors import UserError


class Code:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.path,)


def share(step: int) -> CheckpointShard:
    network = {"weight": torch.full((2, 3), float(step))}
    return CheckpointShard(
        step,
        network=network,
        momentum=network,
        optimizer={"momentum_buffer/weight@0": torch.zeros(6)},
        queue=torch.zeros(4, 2),
        statistics={"query.mean": torch.zeros(2)},
    )


def seal(folder: Path, **changes: bytes) -> None:
    """Seal the folder's files as they are now, as whoever can write it could, after changing some."""
    for name, data in changes.items():
        (folder / name.replace("__", "-").replace("_safetensors", ".safetensors")).write_bytes(data)
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "COMMITTED"}
    seals = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    (folder / "COMMITTED").write_text(json.dumps({"files": seals}))


def with_pickle(folder: Path) -> None:
    seal(folder, network_safetensors=pickle.dumps(Code(folder.parent / "ran")))


def with_traversal(folder: Path) -> None:
    (folder.parent / "secret").write_text("x")
    committed = json.loads((folder / "COMMITTED").read_text())
    committed["files"]["../secret"] = {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    (folder / "COMMITTED").write_text(json.dumps(committed))


def with_wrong_digest(folder: Path) -> None:
    data = bytearray((folder / "network.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "network.safetensors").write_bytes(data)


def with_wrong_shapes(folder: Path) -> None:
    seal(folder, network_safetensors=to_bytes({"weight": torch.zeros(3, 3)}))


def with_enormous_header(folder: Path) -> None:
    seal(folder, network_safetensors=(2**62).to_bytes(8, "little") + b"{}")


def with_offsets_outside(folder: Path) -> None:
    header = json.dumps({"weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 2**40]}}).encode()
    seal(folder, network_safetensors=len(header).to_bytes(8, "little") + header)


def with_missing_pieces(folder: Path) -> None:
    piece = {"momentum_buffer/weight@3": torch.zeros(3)}
    seal(folder, optimizer__00000_safetensors=to_bytes(piece))


def with_deep_json(folder: Path) -> None:
    (folder / "COMMITTED").write_bytes(b'{"files":' * 100_000)


def with_huge_json(folder: Path) -> None:
    (folder / "COMMITTED").write_bytes(b" " * (2**24 + 1))


def with_many_ranks(folder: Path) -> None:
    state = json.loads((folder / "state.json").read_text()) | {"ranks": 10**9}
    (folder / "state.json").write_text(json.dumps(state))
    seal(folder)


def with_position_outside(folder: Path) -> None:
    state = json.loads((folder / "state.json").read_text()) | {"queue_position": 4}
    (folder / "state.json").write_text(json.dumps(state))
    seal(folder)


def of_another_step(folder: Path) -> None:
    state = json.loads((folder / "state.json").read_text()) | {"step": 10**8}
    (folder / "state.json").write_text(json.dumps(state))
    seal(folder)


POISONS = [
    (with_pickle, "network.safetensors"),
    (with_traversal, "names '../secret'"),
    (with_wrong_digest, "not what was written"),
    (with_wrong_shapes, "not of one shape"),
    (with_enormous_header, "announces a header of"),
    (with_offsets_outside, "not readable as safetensors"),
    (with_missing_pieces, "has not all of"),
    (with_deep_json, "not JSON"),
    (with_huge_json, "larger than"),
    (with_many_ranks, "ranks 1000000000"),
    (with_position_outside, "4 of 4"),
    (of_another_step, "step 100000000"),
]


@pytest.mark.parametrize(("poison", "reason"), POISONS)
def test_a_poisoned_checkpoint_is_refused_and_the_good_one_before_it_resumed(
    tmp_path: Path, poison: Callable[[Path], None], reason: str
) -> None:
    saver = CheckpointManager(str(tmp_path), ProcessGroup(), CheckpointConfig(keep=1))
    saver.save(share(1))
    kept = CheckpointManager(str(tmp_path), ProcessGroup(), CheckpointConfig(keep=9))
    url = kept.save(share(2))
    poison(Path(url))
    step, (refused,) = kept.latest()
    assert step == 1
    assert refused.url == url
    assert reason in refused.reason
    assert not (tmp_path / "ran").exists()
    with pytest.raises(UserError, match="name another checkpoint"):
        read_snapshot(url)


def test_where_no_complete_checkpoint_can_be_used_a_run_does_not_start_over(tmp_path: Path) -> None:
    saver = CheckpointManager(str(tmp_path), ProcessGroup())
    with_wrong_digest(Path(saver.save(share(1))))
    with pytest.raises(UserError, match="none of 1 checkpoints can be used"):
        saver.latest()


def test_a_refused_checkpoint_neither_goes_nor_counts_for_what_is_kept(tmp_path: Path) -> None:
    saver = CheckpointManager(str(tmp_path), ProcessGroup(), CheckpointConfig(keep=9))
    saver.save(share(1))
    with_wrong_digest(Path(saver.save(share(5))))
    resumed = CheckpointManager(str(tmp_path), ProcessGroup(), CheckpointConfig(keep=1))
    assert resumed.latest()[0] == 1
    resumed.save(share(2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000002", "step-000000005"]


def test_the_newest_stay_and_those_that_keep_every_divides() -> None:
    assert leaving(range(1, 11), keep=2, keep_every=None) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert leaving(range(1, 11), keep=2, keep_every=4) == [1, 2, 3, 5, 6, 7]


def test_a_run_stops_in_one_line_after_too_many_checkpoints_in_a_row_that_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = CheckpointManager(str(tmp_path), ProcessGroup(), CheckpointConfig(max_failures=2))

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    for step in (1, 2):
        saver.begin(share(step), since=0.0)
        saver.join()
    with pytest.raises(UserError, match="2 checkpoints in a row could not be written"):
        saver.begin(share(3), since=0.0)
    assert [(event.step, event.in_a_row) for event in saver.news()] == [(1, 1), (2, 2)]
