from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file

import mcl_dist
from launch.cli.main import main
from launch.evaluation.encoder_under_test import load_encoder_under_test
from launch.run.config import PretrainConfig
from mcl_dist.checkpoint import CheckpointConfig, CheckpointManager
from mcl_dist.checkpoint.interchange import export_checkpoint
from mcl_dist.config import build_config
from mcl_dist.distributed.process_group import ProcessGroup
from mcl_dist.errors import UserError
from mcl_dist.model.encoder import Encoder
from mcl_dist.model.network import Network
from mcl_dist.objective.momentum_encoder import MomentumEncoder
from mcl_dist.objective.negative_queue import NegativeQueue
from mcl_dist.storage.folder import Folder
from mcl_dist.training.pretrain_state import PretrainState

CONFIG = build_config(
    PretrainConfig,
    {
        "run": {"dir": "unused"},
        "data": {"train": "unused", "frames": 8, "stride": 4, "crop": 32},
        "encoder": {"width": 4, "blocks": [2, 1]},
        "heads": {"dim": 8},
    },
)


@pytest.fixture
def network() -> Network:
    torch.manual_seed(3)
    network = Network(CONFIG.encoder, CONFIG.heads)
    network(torch.randn(4, 3, 8, 32, 32))  # changes the BatchNorm statistics
    return network


@pytest.fixture
def run(network: Network, tmp_path: Path) -> str:
    state = PretrainState(
        network, MomentumEncoder(network, ProcessGroup(), seed=0, autocast=False), NegativeQueue(torch.rand(4, 8))
    )
    checkpoints = CheckpointManager(f"{tmp_path}/run/checkpoints", ProcessGroup(), CheckpointConfig())
    checkpoints.save(state.shard(3, {}, dataclasses.asdict(CONFIG)))
    return f"{tmp_path}/run"


@pytest.fixture
def clips() -> torch.Tensor:
    return torch.randn(3, 3, 8, 32, 32, generator=torch.Generator().manual_seed(1))


def features(encoder: Encoder, clips: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return encoder(clips).pooled


def tensor_bytes(file: bytes) -> bytes:
    """The bytes after a safetensors file's header."""
    return file[8 + int.from_bytes(file[:8], "little") :]


def export_file(run: str, file_format: str, folder: Path) -> Path:
    out = folder / f"out.{'safetensors' if file_format == 'reference' else file_format}"
    assert main(["export", run, "--format", file_format, "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize("file_format", ["safetensors", "reference"])
def test_an_export_of_an_export_equals_that_of_the_run(run: str, tmp_path: Path, file_format: str) -> None:
    expected = export_checkpoint(run, file_format)
    of_reference = export_checkpoint(str(export_file(run, "reference", tmp_path)), file_format)
    assert of_reference.endswith(tensor_bytes(expected))
    assert export_checkpoint(str(export_file(run, "safetensors", tmp_path)), file_format) == expected


def test_an_export_can_go_to_a_store(run: str) -> None:
    assert main(["export", run, "--format", "safetensors", "--out", "memory://exports/encoder.safetensors"]) == 0
    assert Folder("memory://exports").read("encoder.safetensors") == export_checkpoint(run, "safetensors")


@pytest.mark.parametrize("file_format", ["safetensors", "reference"])
def test_an_export_loads_as_the_same_encoder(
    run: str, network: Network, clips: torch.Tensor, tmp_path: Path, file_format: str
) -> None:
    expected = features(network.encoder.eval(), clips)
    assert torch.equal(features(mcl_dist.load_encoder(run), clips), expected)
    assert torch.equal(features(mcl_dist.load_encoder(str(export_file(run, file_format, tmp_path))), clips), expected)


def test_torchscript_computes_the_same(run: str, network: Network, clips: torch.Tensor, tmp_path: Path) -> None:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", DeprecationWarning)  # PyTorch recommends torch.export
        found = torch.jit.load(str(export_file(run, "torchscript", tmp_path)))(clips)
    torch.testing.assert_close(found, features(network.encoder.eval(), clips), rtol=1e-5, atol=1e-5)


def test_onnx_computes_the_same(run: str, network: Network, clips: torch.Tensor, tmp_path: Path) -> None:
    session = onnxruntime.InferenceSession(str(export_file(run, "onnx", tmp_path)), providers=["CPUExecutionProvider"])
    (found,) = session.run(["features"], {"clips": clips.numpy()})
    assert np.abs(found - features(network.encoder.eval(), clips).numpy()).max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("file_format", ["safetensors", "reference", "torchscript", "onnx"])
def test_equal_weights_give_equal_bytes(run: str, file_format: str) -> None:
    assert export_checkpoint(run, file_format) == export_checkpoint(run, file_format)


@pytest.mark.slow
def test_torchscript_of_equal_weights_is_equal_across_processes(run: str, tmp_path: Path) -> None:
    file = tmp_path / "encoder.pt"
    arguments = ["export", run, "--format", "torchscript", "--out", str(file)]
    subprocess.run([sys.executable, "-m", "launch.cli.main", *arguments], check=True, capture_output=True)
    assert file.read_bytes() == export_checkpoint(run, "torchscript")
    assert str(Path(mcl_dist.__file__).parent).encode() not in file.read_bytes()


def test_the_reference_format_uses_the_names_of_its_checkpoints(run: str, tmp_path: Path, golden: Path) -> None:
    names = set(json.loads((golden / "reference_state_dict.json").read_text()))
    found = set(load_file(export_file(run, "reference", tmp_path)))
    assert {name for name in found if ".head." in name or "order" in name} <= names
    assert {name for name in found if name.startswith("backbone.layer1.0.")} <= names


def test_a_2d_resnet_is_inflated(network: Network, tmp_path: Path) -> None:
    flat = {}
    for name, value in network.encoder.state_dict().items():
        if "conv2_t" not in name:
            flat[f"module.encoder_q.{name}"] = value[:, :, 0].contiguous() if value.ndim == 5 else value
    save_file(flat, tmp_path / "moco.safetensors")
    encoder = mcl_dist.load_encoder(str(tmp_path / "moco.safetensors"))
    assert encoder.config.blocks == (2, 1)
    assert torch.equal(encoder.conv1.weight[:, :, 1], network.encoder.conv1.weight[:, :, 0])


def test_an_exported_encoder_is_evaluated_with_its_training_clips(run: str, tmp_path: Path) -> None:
    encoder_under_test = load_encoder_under_test(str(export_file(run, "safetensors", tmp_path)))
    assert dataclasses.astuple(encoder_under_test.geometry) == (8, 4, 32)


def test_a_file_without_the_required_tensors_is_rejected_in_one_line(run: str, tmp_path: Path) -> None:
    encoder = {f"encoder.{name}": value for name, value in mcl_dist.load_encoder(run).state_dict().items()}
    save_file(encoder, tmp_path / "encoder.safetensors")
    with pytest.raises(UserError, match="lacks inter, intra, order, order_classifier"):
        export_checkpoint(str(tmp_path / "encoder.safetensors"), "reference")
    save_file({"inter.first.weight": torch.zeros(2, 2)}, tmp_path / "heads.safetensors")
    with pytest.raises(UserError, match="holds no encoder"):
        mcl_dist.load_encoder(str(tmp_path / "heads.safetensors"))
    (tmp_path / "encoder.reference").touch()
    with pytest.raises(UserError, match=r"encoder\.reference: ends in none of \.safetensors, .*; rename the file"):
        load_encoder_under_test(str(tmp_path / "encoder.reference"))
    with pytest.raises(UserError, match=r"s3://bucket/encoder\.pth: weights files are read from local disks only"):
        load_encoder_under_test("s3://bucket/encoder.pth")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.safetensors", None, "no such file"),
        ("torn.safetensors", b"", "not a readable weights file"),
        ("torn.pth", b"", "not a readable weights file"),
    ],
)
def test_an_unreadable_weights_file_is_rejected_in_one_line(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_encoder_under_test(str(tmp_path / name))
