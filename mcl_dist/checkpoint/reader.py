"""Reads and verifies complete checkpoints, for any number of ranks."""

import re
from collections.abc import Callable
from typing import Any

import torch
import yaml
from torch import nn

from mcl_dist.checkpoint.format import MOMENTUM, NETWORK, STATE, rank_file, step_folder, steps_in
from mcl_dist.checkpoint.integrity import CorruptCheckpointError, VerifiedFolder
from mcl_dist.checkpoint.state import Snapshot, Tensors
from mcl_dist.config import RUN_CONFIG, build_config
from mcl_dist.errors import UserError
from mcl_dist.model.encoder import Encoder, EncoderConfig
from mcl_dist.model.network import HeadsConfig, Network
from mcl_dist.storage.folder import Folder, readable_errors

PIECE = re.compile(r"(.+)@(\d{1,15})")

Check = Callable[[Snapshot, str], None]


def read_snapshot(url: str, *, rank: int = 0, count: int | None = None) -> Snapshot:
    """Read the checkpoint folder at a URL.

    Args:
        url: of a `step-…` folder.
        rank: whose statistics to load if the checkpoint was saved by `count` ranks.
        count: number of loading ranks; for any other number, or None, statistics are the mean over the saved ranks.

    Raises:
        CorruptCheckpointError: a file is missing or fails verification, or the files contradict one another.
        UserError: the store fails.
    """
    folder = VerifiedFolder(Folder(url))
    state = folder.state
    ranks = range(state["ranks"])
    saved = [folder.tensors(rank_file("statistics", each)) for each in ranks]
    if any(_shapes(statistics) != _shapes(saved[0]) for statistics in saved):
        raise folder.corrupt("the statistics of its ranks are not of one network")
    network, momentum = folder.tensors(NETWORK), folder.tensors(MOMENTUM)
    if momentum and _shapes(momentum) != _shapes(network):
        raise folder.corrupt("its two networks are not of one shape")
    queue = _join_queue(folder, [folder.tensors(rank_file("queue", each)) for each in ranks])
    if state["queue_position"] >= max(1, len(queue)):
        raise folder.corrupt(f"its queue position is {state['queue_position']} of {len(queue)}")
    return Snapshot(
        step=state["step"],
        network=network,
        momentum=momentum,
        optimizer=_join_optimizer(folder, [folder.tensors(rank_file("optimizer", each)) for each in ranks], network),
        queue=queue,
        queue_position=state["queue_position"],
        statistics=saved[rank] if count == len(saved) else _mean(saved),
        progress=state["progress"],
        schedule=state["schedule"],
        config=state["config"],
    )


def newest(folder: Folder, check: Check = lambda *_: None) -> tuple[int | None, list[CorruptCheckpointError]]:
    """Step of the newest usable checkpoint, and an error for each newer one that was rejected.

    Args:
        folder: parent of the `step-…` folders.
        check: called with each verified snapshot and its URL; raises `CorruptCheckpointError` to reject it.
    """
    rejected: list[CorruptCheckpointError] = []
    for step in reversed(steps_in(folder)):
        url = f"{folder.url}/{step_folder(step)}"
        try:
            check(read_snapshot(url), url)
        except CorruptCheckpointError as error:
            rejected.append(error)
        else:
            return step, rejected
    return None, rejected


def resolve(url: str) -> tuple[str, list[CorruptCheckpointError]]:
    """The newest usable `step-…` folder in a run folder or its `checkpoints`; a `step-…` folder resolves to itself.

    Returns:
        Its URL, and an error for each newer checkpoint that was rejected.

    Raises:
        UserError: there is no usable checkpoint.
    """
    folder = Folder(url)
    if folder.exists(STATE):
        return folder.url, []
    rejected: list[CorruptCheckpointError] = []
    for candidate in (folder, Folder(_checkpoints_url(folder))):
        step, errors = newest(candidate)
        rejected += errors
        if step is not None:
            return f"{candidate.url}/{step_folder(step)}", rejected
    if rejected:
        raise rejected[0]
    raise UserError(f"{url}: no complete checkpoint; name a run folder or a step-… folder in it")


def _checkpoints_url(run: Folder) -> str:
    """The checkpoint folder that the run's configuration names."""
    section = None
    if run.exists(RUN_CONFIG):
        with readable_errors(f"{run.url}/{RUN_CONFIG}"):
            settings = yaml.safe_load(run.read(RUN_CONFIG))
        section = settings.get("checkpoint") if isinstance(settings, dict) else None
    return (section or {}).get("folder") or f"{run.url}/checkpoints"


def restore(module: nn.Module, parameters: Tensors, statistics: Tensors, side: str, where: str) -> None:
    """Load parameters, and the statistics of `side` (`query` or `key`), into a module.

    Raises:
        UserError: names or shapes belong to another architecture; `where` names the checkpoint in the message.
    """
    mismatch = first_mismatch(module, parameters, statistics, side)
    if mismatch is not None:
        raise UserError(
            f"{where}: holds another architecture ({mismatch}); use its own configuration, or another run.dir"
        )
    module.load_state_dict(parameters | _side_statistics(statistics, side))


def first_mismatch(module: nn.Module, parameters: Tensors, statistics: Tensors, side: str) -> str | None:
    """Description of the first tensor whose name or shape differs from the module's; None if all match."""
    own = {name: value.shape for name, value in module.state_dict().items()}
    stored = {name: value.shape for name, value in (parameters | _side_statistics(statistics, side)).items()}
    for name in sorted(own.keys() | stored.keys()):
        if own.get(name) != stored.get(name):
            return f"{name} is {_shape(stored.get(name))} there, {_shape(own.get(name))} here"
    return None


def load_encoder(url: str) -> tuple[Encoder, dict[str, Any]]:
    """The query encoder of a checkpoint, in evaluation mode, and its run's configuration, as `load_network`."""
    network, config = load_network(url)
    return network.encoder.eval(), config


def load_network(url: str) -> tuple[Network, dict[str, Any]]:
    """The query network of a checkpoint, and the configuration of its run.

    BatchNorm statistics are the mean over the saved ranks.

    Args:
        url: as for `resolve`.

    Raises:
        UserError: there is no such checkpoint, or it is corrupt.
    """
    step_url, _ = resolve(url)
    snapshot = read_snapshot(step_url)
    encoder, heads = (snapshot.config.get(section) for section in ("encoder", "heads"))
    if not isinstance(encoder, dict) or not isinstance(heads, dict):
        raise UserError(f"{step_url}: its configuration has no encoder and heads; name a checkpoint of pre-training")
    network = Network(build_config(EncoderConfig, encoder), build_config(HeadsConfig, heads))
    restore(network, snapshot.network, snapshot.statistics, "query", step_url)
    return network, snapshot.config


def _join_optimizer(folder: VerifiedFolder, shards: list[Tensors], network: Tensors) -> Tensors:
    """The optimizer state `key/name` in the parameters' shapes, from the ranks' pieces `key/name@start`."""
    pieces: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for shard in shards:
        for name, piece in shard.items():
            match = PIECE.fullmatch(name)
            if match is None or piece.ndim != 1:
                raise folder.corrupt(f"its optimizer state has a piece {name[:80]!r} of shape {_shape(piece.shape)}")
            pieces.setdefault(match[1], []).append((int(match[2]), piece))
    return {name: _join_pieces(folder, name, found, network) for name, found in pieces.items()}


def _join_pieces(
    folder: VerifiedFolder, name: str, pieces: list[tuple[int, torch.Tensor]], network: Tensors
) -> torch.Tensor:
    pieces.sort(key=lambda piece: piece[0])
    end = 0
    for start, values in pieces:
        if start != end:
            raise folder.corrupt(f"its optimizer state has not all of {name[:80]!r}")
        end += len(values)
    joined = torch.cat([values for _, values in pieces])
    parameter = network.get(name.partition("/")[2])
    if parameter is None:
        return joined
    if parameter.numel() != end:
        raise folder.corrupt(f"its optimizer state has {end} values of {name[:80]!r}, not {parameter.numel()}")
    return joined.view(parameter.shape)


def _join_queue(folder: VerifiedFolder, shards: list[Tensors]) -> torch.Tensor:
    tensors = [shard.get("queue", torch.empty(0)) for shard in shards]
    if any(tensor.ndim != 2 or tensor.shape[1] != tensors[0].shape[1] for tensor in tensors):
        raise folder.corrupt("its negatives are not vectors of one length")
    return torch.cat(tensors)


def _mean(saved: list[Tensors]) -> Tensors:
    """Means over ranks; batch counters, which are integers, are equal on all ranks."""
    return {
        name: torch.stack([tensors[name] for tensors in saved]).mean(0) if value.is_floating_point() else value
        for name, value in saved[0].items()
    }


def _side_statistics(statistics: Tensors, side: str) -> Tensors:
    prefix = f"{side}."
    return {name.removeprefix(prefix): value for name, value in statistics.items() if name.startswith(prefix)}


def _shapes(tensors: Tensors) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def _shape(shape: torch.Size | None) -> str:
    return "missing" if shape is None else "×".join(map(str, shape)) or "a scalar"
