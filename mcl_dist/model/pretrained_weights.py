"""Weights from elsewhere: the reference implementation's checkpoints and 2-D ResNets to inflate.

Foreign `.pth` files are opened with torch's restricted loader, which admits tensors and plain containers and runs
no code; `.safetensors` files need no such care.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from mcl_dist.errors import UserError
from mcl_dist.model.encoder import STEM_STRIDE
from mcl_dist.model.network import Network

STEM_TIME_INDEX = 1  # where in the stem's four frames the 2-D kernel sits (METHOD.md, section 3)

# Prefixes of the reference's names and of ours; its spelling of the order classifier is its own.
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

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class InitialConfig:
    """Weights to start from.

    Attributes:
        weights: a `.safetensors` or `.pth` file: what `mcl export` wrote as `safetensors` or `reference`, a checkpoint
            of the reference, or a 2-D ResNet (MoCo-v2's) to inflate; none starts from random weights.
        mlp_head: take the 2-D network's MLP head into the inter head too (Kinetics does, UCF101 does not).
    """

    weights: str | None = None
    mlp_head: bool = True


def initialise(network: Network, config: InitialConfig) -> list[str]:
    """Load the configured weights into the network; returns the names that keep their random start.

    Raises:
        UserError: when the file cannot be read, a tensor of it has no place here or another shape, or it lacks one of
            the encoder's.
    """
    if config.weights is None:
        return list(network.state_dict())
    path = Path(config.weights)
    renamed = under_our_names(read_state(path), mlp_head=config.mlp_head)
    own = network.state_dict()
    for name, tensor in renamed.items():
        if name not in own or own[name].shape != tensor.shape:
            expected = tuple(own[name].shape) if name in own else "no such tensor"
            raise UserError(
                f"{path}: {name} is {tuple(tensor.shape)}, this architecture has {expected}; set encoder.width, "
                "encoder.blocks and heads.dim to those of the file, or leave a 2-D network's head out "
                "(initial.mlp_head=false)"
            )
    network.load_state_dict(renamed, strict=False)
    left = [name for name in own if name not in renamed and not name.endswith("num_batches_tracked")]
    if left and left[0].startswith("encoder."):
        raise UserError(
            f"{path}: has no {left[0]}, which this architecture needs; set encoder.blocks to those of the file"
        )
    return left


def under_our_names(state: State, *, mlp_head: bool) -> State:
    """Our export's tensors as they are, the reference's renamed, or a 2-D ResNet's inflated."""
    state = unwrapped(state)
    if any(name.startswith("encoder.") for name in state):
        return state
    if any(name.startswith("backbone.") for name in state):
        return from_reference(state)
    return inflated(state, mlp_head=mlp_head)


def from_reference(state: State) -> State:
    """The reference's state dict under our names; tensors that MCL's network does not have are kept as they are."""
    return {_renamed(name, REFERENCE_NAMES): tensor for name, tensor in state.items()}


def to_reference(state: State) -> State:
    """Our network's state dict under the reference's names."""
    back = {ours: theirs for theirs, ours in REFERENCE_NAMES.items()}
    return {_renamed(name, back): tensor for name, tensor in state.items()}


def inflated(state: State, *, mlp_head: bool) -> State:
    """A 2-D ResNet's state dict as ours (METHOD.md, section 3, "Start").

    Spatial kernels gain a unit time axis, temporal kernels are identities, the stem's weights sit at time index 1 of
    4. The classifier is left out; the MLP head becomes the inter head if wanted.
    """
    result: State = {}
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


def unwrapped(state: State) -> State:
    """Without the prefixes that data-parallel and MoCo wrappers add; of MoCo's two encoders, the query's."""
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


def read_state(path: Path) -> State:
    """The tensors of a `.safetensors` file or, opened so that it runs no code, a `.pth` file; `UserError` if none."""
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; name another (initial.weights, where a run starts from it)") from error
    except IsADirectoryError as error:
        raise UserError(f"{path}: is a folder; `mcl export` makes a file of a run's newest checkpoint") from error
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
        raise UserError(f"{path}: holds no state dict; expected names with tensors")
    return content
