from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mcl_dist.errors import UserError
from mcl_dist.model.encoder import EncoderConfig
from mcl_dist.model.network import HeadsConfig, Network
from mcl_dist.model.pretrained_weights import InitialConfig, initialise, to_reference

SIZE = EncoderConfig(width=4, blocks=(1, 1))


def network(encoder: EncoderConfig = SIZE, seed: int = 0) -> Network:
    torch.manual_seed(seed)
    return Network(encoder, HeadsConfig(dim=8))


def resnet_2d(encoder: EncoderConfig = SIZE) -> dict[str, torch.Tensor]:
    """State dict of a 2-D ResNet that inflates to this encoder, with MoCo-v2's MLP head."""
    state = {}
    for name, tensor in network(encoder, seed=1).encoder.state_dict().items():
        if name == "conv1.weight" or (tensor.ndim == 5 and "conv2_t" not in name):
            state[name] = tensor[:, :, 0]
        elif "conv2_t" not in name:
            state[name] = tensor
    head = network(encoder, seed=2).inter
    state |= {f"fc.0.{name}": value for name, value in head.first.named_parameters()}
    state |= {f"fc.2.{name}": value for name, value in head.second.named_parameters()}
    return {name: value.detach().clone().contiguous() for name, value in state.items()}


def test_an_inflated_network_is_constant_in_time_on_a_repeated_frame(tmp_path: Path) -> None:
    save_file(resnet_2d(), tmp_path / "moco.safetensors")
    inflated = network().eval()
    initialise(inflated, InitialConfig(str(tmp_path / "moco.safetensors")))
    frame = torch.randn(1, 3, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    short, long = (inflated.encoder(frame.expand(-1, -1, frames, -1, -1)) for frames in (4, 16))
    torch.testing.assert_close(long.summed, short.summed.expand_as(long.summed))


def test_wrapped_moco_checkpoints_load_and_leave_heads_random(tmp_path: Path) -> None:
    wrapped = {f"module.encoder_q.{name}": value for name, value in resnet_2d().items()}
    wrapped |= {"module.encoder_k.conv1.weight": torch.zeros(1), "module.queue": torch.zeros(2, 2)}
    torch.save({"arch": "resnet50", "epoch": 200, "state_dict": wrapped}, tmp_path / "moco.pth.tar")
    for mlp_head in (True, False):
        left = initialise(network(), InitialConfig(str(tmp_path / "moco.pth.tar"), mlp_head=mlp_head))
        assert {name.split(".")[0] for name in left} == {"intra", "order", "order_classifier"} | (
            set() if mlp_head else {"inter"}
        )


def test_exported_safetensors_load_completely(tmp_path: Path) -> None:
    source, target = network(seed=1), network(seed=2)
    save_file(source.state_dict(), tmp_path / "exported.safetensors")
    assert initialise(target, InitialConfig(str(tmp_path / "exported.safetensors"))) == []
    for name, value in source.state_dict().items():
        assert torch.equal(value, target.state_dict()[name]), name


def test_checkpoints_of_the_reference_load_completely(tmp_path: Path) -> None:
    source, target = network(seed=1), network(seed=2)
    state = {f"module.{name}": value for name, value in to_reference(source.state_dict()).items()}
    torch.save({"model": state, "epoch": 3}, tmp_path / "reference.pth")
    assert initialise(target, InitialConfig(str(tmp_path / "reference.pth"))) == []
    for name, value in source.state_dict().items():
        assert torch.equal(value, target.state_dict()[name]), name


def test_a_file_that_would_run_code_is_rejected(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path}/ran",)

    torch.save({"state_dict": {"conv1.weight": Payload()}}, tmp_path / "poisoned.pth")
    with pytest.raises(UserError, match=r"poisoned\.pth: holds more than tensors"):
        initialise(network(), InitialConfig(str(tmp_path / "poisoned.pth")))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no such file"), (b"not weights", "not a readable weights file")]
)
def test_a_missing_or_unreadable_file_is_rejected(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "weights.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        initialise(network(), InitialConfig(str(path)))


def test_weights_of_another_size_are_rejected_with_both_shapes(tmp_path: Path) -> None:
    save_file(resnet_2d(EncoderConfig(width=8, blocks=(1, 1))), tmp_path / "wide.safetensors")
    with pytest.raises(UserError, match=r"encoder\.bn1\.bias is \(8,\), this architecture has \(4,\)"):
        initialise(network(), InitialConfig(str(tmp_path / "wide.safetensors")))


def test_weights_that_lack_a_part_of_the_encoder_are_rejected(tmp_path: Path) -> None:
    save_file(resnet_2d(EncoderConfig(width=4, blocks=(1,))), tmp_path / "shallow.safetensors")
    with pytest.raises(UserError, match=r"shallow\.safetensors: has no encoder\.layer2\.0\.conv1\.weight"):
        initialise(network(), InitialConfig(str(tmp_path / "shallow.safetensors"), mlp_head=False))


def test_a_run_folder_is_rejected_with_the_command_that_exports_a_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder; `mcl export` makes a file"):
        initialise(network(), InitialConfig(str(tmp_path)))


def test_a_linear_classifier_is_rejected_with_the_setting_that_omits_it(tmp_path: Path) -> None:
    state = {name: value for name, value in resnet_2d().items() if not name.startswith("fc.")}
    save_file({**state, "fc.weight": torch.zeros(10, 16)}, tmp_path / "supervised.safetensors")
    with pytest.raises(UserError, match=r"fc\.weight is .*initial\.mlp_head=false"):
        initialise(network(), InitialConfig(str(tmp_path / "supervised.safetensors")))
    initialise(network(), InitialConfig(str(tmp_path / "supervised.safetensors"), mlp_head=False))
