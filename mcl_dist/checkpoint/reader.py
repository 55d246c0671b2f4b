"""Checkpoints read back: whole, checked, by any number of ranks."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
import yaml
from torch import nn

from mcl_dist.checkpoint.format import (
    MOMENTUM,
    NETWORK,
    STATE,
    optimizer_file,
    queue_file,
    statistics_file,
    step_folder,
    steps_in,
)
from mcl_dist.checkpoint.integrity import CheckedFolder, DamagedError
from mcl_dist.checkpoint.state import Snapshot, Tensors
from mcl_dist.config import RUN_CONFIG, build_config
from mcl_dist.errors import UserError
from mcl_dist.model.encoder import Encoder, EncoderConfig
from mcl_dist.model.network import HeadsConfig, Network
from mcl_dist.storage.folder import Folder, naming

PIECE = re.compile(r"(.+)@(\d{1,15})")

Check = Callable[[Snapshot, str], None]


def read_snapshot(url: str, *, rank: int = 0, count: int | None = None) -> Snapshot:
    """Read the checkpoint folder at a URL.

    Args:
        url: of a `step-…` folder.
        rank: whose statistics to take, where as many ranks saved as now load.
        count: ranks that load; none takes the mean of the statistics whatever their number.

    Raises:
        DamagedError: when a file is missing or not what was written, or what they hold does not fit together.
        UserError: when the store fails.
    """
    return _snapshot(Folder(url), rank, count)


def newest(folder: Folder, check: Check = lambda *_: None) -> tuple[int | None, list[DamagedError]]:
    """Step of the newest checkpoint that can be used, and why each newer one cannot.

    Args:
        folder: in which the `step-…` folders are.
        check: is given one that is whole, and its URL; raises `DamagedError` when it is not to be used all the same.
    """
    refused: list[DamagedError] = []
    for step in reversed(steps_in(folder)):
        error = _damage(f"{folder.url}/{step_folder(step)}", check)
        if error is None:
            return step, refused
        refused.append(error)
    return None, refused


def resolve(url: str) -> tuple[str, list[DamagedError]]:
    """The `step-…` folder that a run folder, its `checkpoints` or a `step-…` folder stands for: the newest good one.

    Returns:
        Its URL, and why each newer one cannot be used.

    Raises:
        UserError: when there is none.
    """
    folder = Folder(url)
    if folder.exists(STATE):
        return folder.url, []
    refused: list[DamagedError] = []
    for candidate in (folder, Folder(_checkpoints_of(folder))):
        step, damaged = newest(candidate)
        refused += damaged
        if step is not None:
            return f"{candidate.url}/{step_folder(step)}", refused
    raise (
        refused[0]
        if refused
        else UserError(f"{url}: no complete checkpoint; name a run folder or a step-… folder in it")
    )


def _checkpoints_of(run: Folder) -> str:
    """Where a run of this folder keeps its checkpoints."""
    section = None
    if run.exists(RUN_CONFIG):
        with naming(f"{run.url}/{RUN_CONFIG}"):
            settings = yaml.safe_load(run.read(RUN_CONFIG))
        section = settings.get("checkpoint") if isinstance(settings, dict) else None
    return (section or {}).get("folder") or f"{run.url}/checkpoints"


def restore(module: nn.Module, parameters: Tensors, statistics: Tensors, side: str, where: str) -> None:
    """Load parameters, and the statistics of `side` (`query` or `key`), into a module.

    Raises:
        UserError: when the names or shapes are those of another architecture; `where` names the checkpoint.
    """
    difference = misfit(module, parameters, statistics, side)
    if difference is not None:
        raise UserError(
            f"{where}: holds another architecture ({difference}); use its own configuration, or another run.dir"
        )
    module.load_state_dict(parameters | _of_side(statistics, side))


def misfit(module: nn.Module, parameters: Tensors, statistics: Tensors, side: str) -> str | None:
    """The first tensor that is not the module's in name or shape, in words; None when all are."""
    own = {name: value.shape for name, value in module.state_dict().items()}
    stored = {name: value.shape for name, value in (parameters | _of_side(statistics, side)).items()}
    for name in sorted(own.keys() | stored.keys()):
        if own.get(name) != stored.get(name):
            return f"{name} is {_shape(stored.get(name))} there, {_shape(own.get(name))} here"
    return None


def load_encoder(url: str) -> tuple[Encoder, dict[str, Any]]:
    """The query encoder of a checkpoint, in evaluation mode, and its run's configuration; see `load_network`."""
    network, config = load_network(url)
    return network.encoder.eval(), config


def load_network(url: str) -> tuple[Network, dict[str, Any]]:
    """The query network of a checkpoint, and the configuration of the run that made it.

    BatchNorm statistics are the mean over the ranks that saved. `url` is as for `resolve`.

    Raises:
        UserError: when there is no such checkpoint or it is damaged.
    """
    step_url, _ = resolve(url)
    snapshot = read_snapshot(step_url)
    encoder, heads = (snapshot.config.get(section) for section in ("encoder", "heads"))
    if not isinstance(encoder, dict) or not isinstance(heads, dict):
        raise UserError(f"{step_url}: its configuration has no encoder and heads; name a checkpoint of pre-training")
    network = Network(build_config(EncoderConfig, encoder), build_config(HeadsConfig, heads))
    restore(network, snapshot.network, snapshot.statistics, "query", step_url)
    return network, snapshot.config


def _damage(url: str, check: Check) -> DamagedError | None:
    try:
        check(read_snapshot(url), url)
    except DamagedError as error:
        return error
    return None


def _snapshot(folder: Folder, rank: int, count: int | None) -> Snapshot:
    sealed = CheckedFolder(folder)
    state = sealed.state
    ranks = range(state["ranks"])
    saved = [sealed.tensors(statistics_file(each)) for each in ranks]
    if any(_shapes(statistics) != _shapes(saved[0]) for statistics in saved):
        raise sealed.damaged("the statistics of its ranks are not of one network")
    network, momentum = sealed.tensors(NETWORK), sealed.tensors(MOMENTUM)
    if momentum and _shapes(momentum) != _shapes(network):
        raise sealed.damaged("its two networks are not of one shape")
    queue = _queue(sealed, [sealed.tensors(queue_file(each)) for each in ranks])
    if state["queue_position"] >= max(1, len(queue)):
        raise sealed.damaged(f"its next key goes to {state['queue_position']} of {len(queue)}")
    return Snapshot(
        step=state["step"],
        network=network,
        momentum=momentum,
        optimizer=_joined(sealed, [sealed.tensors(optimizer_file(each)) for each in ranks], network),
        queue=queue,
        queue_position=state["queue_position"],
        statistics=saved[rank] if count == len(saved) else _mean(saved),
        progress=state["progress"],
        schedule=state["schedule"],
        config=state["config"],
    )


def _joined(sealed: CheckedFolder, parts: list[Tensors], network: Tensors) -> Tensors:
    """The optimizer's state `key/name`, in the shapes of the parameters, of the ranks' pieces `key/name@start`."""
    pieces: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for part in parts:
        for name, piece in part.items():
            match = PIECE.fullmatch(name)
            if match is None or piece.ndim != 1:
                raise sealed.damaged(f"its optimizer's state has a piece {name[:80]!r} of shape {_shape(piece.shape)}")
            pieces.setdefault(match[1], []).append((int(match[2]), piece))
    return {name: _whole(sealed, name, found, network) for name, found in pieces.items()}


def _whole(sealed: CheckedFolder, name: str, pieces: list[tuple[int, torch.Tensor]], network: Tensors) -> torch.Tensor:
    pieces.sort(key=lambda piece: piece[0])
    end = 0
    for start, values in pieces:
        if start != end:
            raise sealed.damaged(f"its optimizer's state has not all of {name[:80]!r}")
        end += len(values)
    whole = torch.cat([values for _, values in pieces])
    parameter = network.get(name.partition("/")[2])
    if parameter is None:
        return whole
    if parameter.numel() != end:
        raise sealed.damaged(f"its optimizer's state has {end} values of {name[:80]!r}, not {parameter.numel()}")
    return whole.view(parameter.shape)


def _queue(sealed: CheckedFolder, parts: list[Tensors]) -> torch.Tensor:
    tensors = [part.get("queue", torch.empty(0)) for part in parts]
    if any(tensor.ndim != 2 or tensor.shape[1] != tensors[0].shape[1] for tensor in tensors):
        raise sealed.damaged("its negatives are not vectors of one length")
    return torch.cat(tensors)


def _mean(saved: list[Tensors]) -> Tensors:
    """Means over ranks; counters of batches, which are whole numbers, are equal on all."""
    return {
        name: torch.stack([tensors[name] for tensors in saved]).mean(0) if value.is_floating_point() else value
        for name, value in saved[0].items()
    }


def _of_side(statistics: Tensors, side: str) -> Tensors:
    prefix = f"{side}."
    return {name.removeprefix(prefix): value for name, value in statistics.items() if name.startswith(prefix)}


def _shapes(tensors: Tensors) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def _shape(shape: torch.Size | None) -> str:
    return "missing" if shape is None else "×".join(map(str, shape)) or "a scalar"
