from __future__ import annotations

import dataclasses
import errno
import json
from pathlib import Path

import pytest
import torch

from mcl_dist.checkpoint import COMMITTED, CheckpointConfig, CheckpointManager, CheckpointShard, load_encoder, resolve
from mcl_dist.distributed.process_group import ProcessGroup
from mcl_dist.errors import UserError
from mcl_dist.model.encoder import EncoderConfig
from mcl_dist.model.network import HeadsConfig, Network
from mcl_dist.objective.momentum_encoder import MomentumEncoder
from mcl_dist.objective.negative_queue import NegativeQueue
from mcl_dist.training.pretrain_state import PretrainState

ENCODER, HEADS = EncoderConfig(width=4, blocks=(1,)), HeadsConfig(dim=8)
CONFIG = {"encoder": dataclasses.asdict(ENCODER), "heads": dataclasses.asdict(HEADS)}


def state(seed: int, encoder: EncoderConfig = ENCODER) -> PretrainState:
    torch.manual_seed(seed)
    network = Network(encoder, HEADS).train()
    momentum = MomentumEncoder(network, ProcessGroup(), seed=0, autocast=False)
    with torch.no_grad():
        network(torch.randn(2, 3, 4, 16, 16))
    return PretrainState(network, momentum, NegativeQueue(torch.rand(6, 8), position=seed))


def shard(step: int, seed: int = 0) -> CheckpointShard:
    return state(seed).shard(step, {"momentum_buffer/x@0": torch.full((2,), float(step))}, CONFIG)


def manager_of(folder: Path, keep: int = 9) -> CheckpointManager:
    return CheckpointManager(str(folder), ProcessGroup(), CheckpointConfig(keep=keep))


def test_a_state_is_restored_exactly(tmp_path: Path) -> None:
    first, second = state(seed=3), state(seed=4)
    manager_of(tmp_path).save(first.shard(7, {}, CONFIG))
    second.restore(manager_of(tmp_path).load(7), "here")
    for module, other in ((first.network, second.network), (first.momentum.network, second.momentum.network)):
        for name, value in module.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name
    assert torch.equal(first.queue.vectors, second.queue.vectors)
    assert second.queue.position == 3


def test_the_newest_checkpoints_are_kept_and_older_ones_removed(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        manager_of(tmp_path, keep=2).save(shard(step))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000002", "step-000000003"]


def test_checkpoints_work_on_any_filesystem(tmp_path: Path) -> None:
    manager = CheckpointManager(f"memory://{tmp_path.name}", ProcessGroup(), CheckpointConfig(keep=1))
    manager.save(shard(1))
    manager.save(shard(2))
    assert manager.latest() == (2, [])
    assert manager.load(2).step == 2


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        (COMMITTED, None),
        (COMMITTED, b"{"),
        ("network.safetensors", None),
        ("queue-00000.safetensors", b"short"),
        ("state.json", b"{}"),
    ],
)
def test_an_unusable_checkpoint_is_skipped_and_reported(tmp_path: Path, file: str, damage: bytes | None) -> None:
    manager = manager_of(tmp_path)
    manager.save(shard(1))
    manager.save(shard(2))
    path = tmp_path / "step-000000002" / file
    path.unlink() if damage is None else path.write_bytes(damage)
    step, rejected = manager.latest()
    assert step == 1
    assert len(rejected) == 1
    assert rejected[0].url.endswith("step-000000002")


def test_a_full_disk_is_one_line_and_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = manager_of(tmp_path)
    manager.save(shard(1))

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=r"step-000000002.*no space left"):
        manager.save(shard(2))
    monkeypatch.undo()
    assert manager.latest() == (1, [])
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001"]
    assert [type(event).__name__ for event in manager.pop_events()] == ["CheckpointWritten", "CheckpointFailed"]
    manager.save(shard(3))
    assert manager.latest() == (3, [])


def test_another_architecture_is_rejected_with_the_first_mismatch(tmp_path: Path) -> None:
    manager_of(tmp_path).save(shard(1))
    wider = state(seed=0, encoder=EncoderConfig(width=8, blocks=(1,)))
    with pytest.raises(UserError, match=r"there: holds another architecture \(encoder\.bn1\.bias is 4 there, 8 here\)"):
        wider.restore(manager_of(tmp_path).load(1), "there")


@pytest.mark.parametrize("name", ["", "checkpoints", "checkpoints/step-000000005"])
def test_an_encoder_loads_from_a_run_its_checkpoints_or_one_of_them(tmp_path: Path, name: str) -> None:
    manager_of(tmp_path / "checkpoints").save(shard(5))
    encoder, config = load_encoder(f"{tmp_path}/{name}")
    assert not encoder.training
    assert config == json.loads(json.dumps(CONFIG))
    assert torch.equal(encoder.conv1.weight, shard(5).network["encoder.conv1.weight"])


def test_a_run_resolves_to_its_configured_checkpoint_folder(tmp_path: Path) -> None:
    manager_of(tmp_path / "store").save(shard(5))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(f"checkpoint:\n  folder: {tmp_path}/store\n")
    assert resolve(str(tmp_path / "run")) == (f"{tmp_path}/store/step-000000005", [])


def test_a_folder_without_checkpoints_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no complete checkpoint"):
        resolve(str(tmp_path))
