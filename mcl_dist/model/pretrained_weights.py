"""Pretrained weights: checkpoints of the reference implementation, and 2-D ResNets to inflate.

`.pth` files are opened with torch's restricted loader, which admits only tensors and plain containers and runs no
code; `.safetensors` files cannot hold code.
"""

import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from mcl_dist.errors import UserError
from mcl_dist.model.encoder import STEM_STRIDE
from mcl_dist.model.network import Network

STEM_TIME_INDEX = 1  # frame of the stem's four that takes the 2-D kernel (METHOD.md, section 3)

# Prefixes of the reference's names and of ours; `classfier` is the reference's spelling.
REFERENCE_NAMES = {
    "backbone.": "encoder.",
    "nce_inter_head.head.0.": "inter.first.",
    "nce_inter_head.head.2.": "inter.second.",
    "nce_intra_head.head.0.": "intra.first.",
    "nce_intra_head.head.2.": "intra.second.",
    "order_head.head.0.": "order.first.",
    "order_head.head.2.": "order.second.",
    "order_classfier.fc.": "order_classifier.",
}
MLP_HEAD_NAMES = {"fc.0.": "inter.first.", "fc.2.": "inter.second."}
WRAPPERS = ("module.", "encoder_q.")
CONTAINERS = ("state_dict", "model")

StateDict = dict[str, torch.Tensor]


@dataclass(frozen=True)
class InitialConfig:
    """Initial weights.

    Attributes:
        weights: a `.safetensors` or `.pth` file: an export by `mcl export` as `safetensors` or `reference`, a
            checkpoint of the reference, or a 2-D ResNet (MoCo-v2's) to inflate; None for random weights.
        mlp_head: load the 2-D network's MLP head into the inter head (Kinetics: yes, UCF101: no).
    """

    weights: str | None = None
    mlp_head: bool = True


def initialise(network: Network, config: InitialConfig) -> list[str]:
    """Load the configured weights into the network; returns the names of tensors that keep their random values.

    Raises:
        UserError: the file cannot be read, has a tensor of unknown name or other shape, or lacks a tensor of the
            encoder.
    """
    if config.weights is None:
        return list(network.state_dict())
    path = Path(config.weights)
    loaded = convert_state_dict(read_state_dict(path), mlp_head=config.mlp_head)
    own = network.state_dict()
    for name, tensor in loaded.items():
        if name not in own or own[name].shape != tensor.shape:
            expected = tuple(own[name].shape) if name in own else "no such tensor"
            raise UserError(
                f"{path}: {name} is {tuple(tensor.shape)}, this architecture has {expected}; set encoder.width, "
                "encoder.blocks and heads.dim to those of the file, or omit the head of a 2-D network "
                "(initial.mlp_head=false)"
            )
    network.load_state_dict(loaded, strict=False)
    missing = [name for name in own if name not in loaded and not name.endswith("num_batches_tracked")]
    if missing and missing[0].startswith("encoder."):
        raise UserError(
            f"{path}: has no {missing[0]}, which this architecture needs; set encoder.blocks to those of the file"
        )
    return missing


def convert_state_dict(state: StateDict, *, mlp_head: bool) -> StateDict:
    """A state dict under our names: ours unchanged, the reference's renamed, a 2-D ResNet's inflated."""
    state = strip_prefixes(state)
    if any(name.startswith("encoder.") for name in state):
        return state
    if any(name.startswith("backbone.") for name in state):
        return from_reference(state)
    return inflate(state, mlp_head=mlp_head)


def from_reference(state: StateDict) -> StateDict:
    """The reference's state dict under our names; names of tensors that MCL's network lacks stay as they are."""
    return {_renamed(name, REFERENCE_NAMES): tensor for name, tensor in state.items()}


def to_reference(state: StateDict) -> StateDict:
    """Our network's state dict under the reference's names."""
    back = {ours: theirs for theirs, ours in REFERENCE_NAMES.items()}
    return {_renamed(name, back): tensor for name, tensor in state.items()}


def inflate(state: StateDict, *, mlp_head: bool) -> StateDict:
    """Inflate a 2-D ResNet's state dict to ours (METHOD.md, section 3, "Start").

    Spatial kernels gain a time axis of size 1, temporal kernels are identities, and the stem's kernel goes to time
    index 1 of 4. The classifier is omitted; the MLP head becomes the inter head if `mlp_head`.
    """
    result: StateDict = {}
    for name, tensor in state.items():
        if name.startswith("fc."):
            if mlp_head:
                result[_renamed(name, MLP_HEAD_NAMES)] = tensor
            continue
        ours = f"encoder.{name}"
        if ours == "encoder.conv1.weight":
            result[ours] = tensor.new_zeros(*tensor.shape[:2], STEM_STRIDE[0], *tensor.shape[2:])
            result[ours][:, :, STEM_TIME_INDEX] = tensor
        elif tensor.ndim == 4:
            result[ours] = tensor.unsqueeze(2)
        else:
            result[ours] = tensor
        if name.endswith("conv2.weight"):
            result[ours.replace("conv2", "conv2_t")] = _identity(tensor)
    return result


def strip_prefixes(state: StateDict) -> StateDict:
    """Remove the prefixes of data-parallel and MoCo wrappers; of MoCo's two encoders, keep the query's."""
    if any("encoder_q." in name for name in state):
        state = {name: tensor for name, tensor in state.items() if "encoder_q." in name}
    for prefix in WRAPPERS:
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _identity(spatial: torch.Tensor) -> torch.Tensor:
    channels = spatial.shape[0]
    kernel = spatial.new_zeros(channels, channels, 3, 1, 1)
    kernel[:, :, 1, 0, 0] = torch.eye(channels, dtype=spatial.dtype)
    return kernel


def _renamed(name: str, prefixes: dict[str, str]) -> str:
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def read_state_dict(path: Path) -> StateDict:
    """The tensors of a `.safetensors` file, or of a `.pth` file without running its code; `UserError` if unreadable."""
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; name another (in a run: initial.weights)") from error
    except IsADirectoryError as error:
        raise UserError(f"{path}: is a folder; `mcl export` makes a file from a run's newest checkpoint") from error
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: holds more than tensors, which could run code; save it as safetensors") from error
    except Exception as error:
        raise UserError(
            f"{path}: not a readable weights file ({(str(error).splitlines() or [type(error).__name__])[0]})"
        ) from error
    for container in CONTAINERS:
        if isinstance(content, dict) and isinstance(content.get(container), dict):
            content = content[container]
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise UserError(f"{path}: holds no state dict; save one that maps names to tensors")
    return content
