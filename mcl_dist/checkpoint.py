"""Checkpoints without pickle and without a world size.

A checkpoint is a folder `step-000001200/`:

- `state.json`: format, step, queue position, number of ranks, the run's configuration;
- `network.safetensors`, `momentum.safetensors`: parameters of query and key network, float32;
- `optimizer.safetensors`: full state per parameter; `queue.safetensors`: the negatives;
- `statistics-00000.safetensors`, one per rank: BatchNorm statistics of both networks;
- `COMMITTED`: sizes and digests of all of these, written last. A folder without it is torn, and never resumed.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import nn

from mcl_dist.config import build_config, number
from mcl_dist.encoder import Encoder, EncoderConfig
from mcl_dist.errors import UserError
from mcl_dist.heads import HeadsConfig, Network
from mcl_dist.ranks import Ranks
from mcl_dist.storage import Folder

FORMAT = 1
COMMITTED = "COMMITTED"
STEP_FOLDER = re.compile(r"step-(\d{9})")
DIGEST_BYTES = 32
SIZE_BYTES = 8

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class CheckpointConfig:
    """When and where checkpoints are written.

    Attributes:
        every: steps between checkpoints; the last step always has one.
        keep: newest checkpoints kept.
        folder: URL to write to; none means `checkpoints` in the run folder.
    """

    every: int = number(1000, minimum=1)
    keep: int = number(3, minimum=1)
    folder: str | None = None


@dataclass
class Snapshot:
    """All that a run needs to go on as if it had not stopped.

    Attributes:
        step: steps done.
        network, momentum: parameters by name.
        optimizer: `Engine.optimizer_state`.
        queue: (K, d), and where the next key goes.
        statistics: BatchNorm buffers of this rank, `query.` and `key.` before their names.
        config: the run's resolved configuration.
    """

    step: int
    network: Tensors
    momentum: Tensors
    optimizer: Tensors
    queue: torch.Tensor
    queue_position: int
    statistics: Tensors
    config: dict[str, Any] = field(default_factory=dict)


class Checkpoints:
    """The checkpoints of one run, below one URL."""

    def __init__(self, url: str, ranks: Ranks, *, keep: int) -> None:
        self.url = url
        self._folder = Folder(url)
        self._ranks = ranks
        self._keep = keep

    def save(self, snapshot: Snapshot) -> tuple[str, float, int]:
        """Write a checkpoint, all ranks together; returns its URL, the seconds that it took, and its bytes.

        Raises:
            UserError: on every rank when one of them could not write; what it wrote is removed.
        """
        start = time.monotonic()
        name = _step_folder(snapshot.step)
        folder = Folder(f"{self.url}/{name}")
        written: dict[str, bytes] = {}
        error: UserError | None = None
        try:
            if self._ranks.is_first:
                self._folder.remove(f"{name}/{COMMITTED}")
                for file, data in _shared_files(snapshot, self._ranks.count):
                    folder.write(file, data)
                    written[file] = _seal(data)
            data = to_bytes(snapshot.statistics)
            folder.write(_statistics_file(self._ranks.rank), data)
            statistics = _seal(data)
        except UserError as caught:
            error, statistics = caught, bytes(SIZE_BYTES + DIGEST_BYTES)
        failures = round(float(self._ranks.mean(torch.tensor(float(error is not None)))) * self._ranks.count)
        if failures:
            self._give_up(name)
            raise error or UserError(f"{folder.url}: {failures} other ranks could not write; see their logs")
        num_bytes = self._commit(folder, written, statistics)
        self._retire()
        return folder.url, time.monotonic() - start, num_bytes

    def latest(self) -> tuple[int | None, list[str]]:
        """Step of the newest complete checkpoint, on all ranks, and on the first a line for each newer torn one."""
        step, torn = newest(self._folder) if self._ranks.is_first else (None, [])
        step = self._ranks.from_first(-1 if step is None else step)
        return None if step < 0 else step, torn

    def load(self, step: int) -> Snapshot:
        """Read a checkpoint; with another number of ranks, statistics are the mean over the ranks that saved."""
        return read_snapshot(self.step_url(step), rank=self._ranks.rank, count=self._ranks.count)

    def step_url(self, step: int) -> str:
        """Where the checkpoint of a step lies."""
        return f"{self.url}/{_step_folder(step)}"

    def _commit(self, folder: Folder, written: dict[str, bytes], statistics: bytes) -> int:
        seals = self._ranks.gather(torch.frombuffer(bytearray(statistics), dtype=torch.uint8)[None])
        if self._ranks.is_first:
            for rank, seal in enumerate(seals):
                written[_statistics_file(rank)] = bytes(seal.tolist())
            folder.write(COMMITTED, json.dumps({"files": {n: _legible(s) for n, s in written.items()}}).encode())
        self._ranks.barrier()
        return sum(int.from_bytes(seal[:SIZE_BYTES], "big") for seal in written.values())

    def _give_up(self, name: str) -> None:
        self._ranks.barrier()
        if self._ranks.is_first:
            self._folder.remove(name)

    def _retire(self) -> None:
        if self._ranks.is_first:
            for step in sorted(steps_in(self._folder))[: -self._keep]:
                self._folder.remove(f"{_step_folder(step)}/{COMMITTED}")
                self._folder.remove(_step_folder(step))


def read_snapshot(url: str, *, rank: int = 0, count: int | None = None) -> Snapshot:
    """Read the checkpoint folder at a URL.

    Args:
        url: of a `step-…` folder.
        rank: whose statistics to take, where as many ranks saved as now load.
        count: ranks that load; none takes the mean of the statistics whatever their number.

    Raises:
        UserError: when a file is missing, unreadable or of another format.
    """
    folder = Folder(url)
    state = _state(folder)
    saved = [_tensors(folder, _statistics_file(index)) for index in range(state["ranks"])]
    return Snapshot(
        step=state["step"],
        network=_tensors(folder, "network.safetensors"),
        momentum=_tensors(folder, "momentum.safetensors"),
        optimizer=_tensors(folder, "optimizer.safetensors"),
        queue=_tensors(folder, "queue.safetensors")["queue"],
        queue_position=state["queue_position"],
        statistics=saved[rank] if count == len(saved) else _mean(saved),
        config=state["config"],
    )


def newest(folder: Folder) -> tuple[int | None, list[str]]:
    """Step of the newest checkpoint whose files are what was written, and a line for each newer torn one."""
    torn: list[str] = []
    for step in sorted(steps_in(folder), reverse=True):
        url = f"{folder.url}/{_step_folder(step)}"
        reason = damage(Folder(url))
        if reason is None:
            return step, torn
        torn.append(f"{url}: skipped, {reason}")
    return None, torn


def resolve(url: str) -> str:
    """The `step-…` folder that a run folder, its `checkpoints` or a `step-…` folder stands for: the newest good one.

    Raises:
        UserError: when there is none.
    """
    folder = Folder(url)
    if folder.exists("state.json"):
        reason = damage(folder)
        if reason is not None:
            raise UserError(f"{url}: {reason}; name another checkpoint")
        return folder.url
    for candidate in (folder, Folder(f"{url}/checkpoints")):
        step, _ = newest(candidate)
        if step is not None:
            return f"{candidate.url}/{_step_folder(step)}"
    raise UserError(f"{url}: no complete checkpoint; name a run folder or a step-… folder in it")


def steps_in(folder: Folder) -> list[int]:
    """Steps that have a checkpoint folder, complete or not."""
    matches = (STEP_FOLDER.fullmatch(name) for name in folder.names())
    return [int(match[1]) for match in matches if match]


def damage(folder: Folder) -> str | None:
    """What keeps a checkpoint from being used, or None."""
    if not folder.exists(COMMITTED):
        return "it was never completed"
    try:
        files = json.loads(folder.read(COMMITTED))["files"]
        for name, seal in files.items():
            if _legible(_seal(folder.read(name))) != seal:
                return f"{name} is not what was written"
    except (UserError, ValueError, KeyError, TypeError, AttributeError) as error:
        return str(error)
    return None


def restore(module: nn.Module, parameters: Tensors, statistics: Tensors, side: str, where: str) -> None:
    """Load parameters, and the statistics of `side` (`query` or `key`), into a module.

    Raises:
        UserError: when the names or shapes are those of another architecture; `where` names the checkpoint.
    """
    prefix = f"{side}."
    buffers = {name.removeprefix(prefix): value for name, value in statistics.items() if name.startswith(prefix)}
    own = {name: value.shape for name, value in module.state_dict().items()}
    stored = {name: value.shape for name, value in (parameters | buffers).items()}
    if own != stored:
        differing = next(name for name in sorted(own.keys() | stored.keys()) if own.get(name) != stored.get(name))
        raise UserError(
            f"{where}: holds another architecture ({differing} is {_shape(stored.get(differing))} there, "
            f"{_shape(own.get(differing))} here); use its own configuration, or another run.dir"
        )
    module.load_state_dict(parameters | buffers)


def load_encoder(url: str) -> tuple[Encoder, dict[str, Any]]:
    """The query encoder of a checkpoint, in evaluation mode, and the configuration of the run that made it.

    BatchNorm statistics are the mean over the ranks that saved. `url` is as for `resolve`.

    Raises:
        UserError: when there is no such checkpoint or it is damaged.
    """
    step_url = resolve(url)
    snapshot = read_snapshot(step_url)
    network = Network(
        build_config(EncoderConfig, snapshot.config["encoder"]), build_config(HeadsConfig, snapshot.config["heads"])
    )
    restore(network, snapshot.network, snapshot.statistics, "query", step_url)
    return network.encoder.eval(), snapshot.config


def _shape(shape: torch.Size | None) -> str:
    return "missing" if shape is None else "×".join(map(str, shape)) or "a scalar"


def _shared_files(snapshot: Snapshot, count: int) -> list[tuple[str, bytes]]:
    state = {
        "format": FORMAT,
        "step": snapshot.step,
        "queue_position": snapshot.queue_position,
        "ranks": count,
        "config": snapshot.config,
    }
    return [
        ("state.json", json.dumps(state, indent=1).encode()),
        ("network.safetensors", to_bytes(snapshot.network)),
        ("momentum.safetensors", to_bytes(snapshot.momentum)),
        ("optimizer.safetensors", to_bytes(snapshot.optimizer)),
        ("queue.safetensors", to_bytes({"queue": snapshot.queue})),
    ]


def _state(folder: Folder) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads(folder.read("state.json"))
        if state["format"] != FORMAT:
            raise UserError(f"{folder.url}/state.json: format {state['format']}, this version reads {FORMAT}")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder.url}/state.json: not a checkpoint's state ({error})") from error
    return state


def _tensors(folder: Folder, name: str) -> Tensors:
    data = folder.read(name)
    try:
        return dict(from_bytes(data))
    except Exception as error:
        raise UserError(f"{folder.url}/{name}: not readable as safetensors ({error})") from error


def _mean(saved: list[Tensors]) -> Tensors:
    """Means over ranks; counters of batches, which are whole numbers, are equal on all."""
    return {
        name: torch.stack([tensors[name] for tensors in saved]).mean(0) if value.is_floating_point() else value
        for name, value in saved[0].items()
    }


def _seal(data: bytes) -> bytes:
    """Size and digest in a fixed number of bytes, so that ranks can exchange them as tensors."""
    return len(data).to_bytes(SIZE_BYTES, "big") + hashlib.sha256(data).digest()


def _legible(seal: bytes) -> dict[str, Any]:
    return {"bytes": int.from_bytes(seal[:SIZE_BYTES], "big"), "sha256": seal[SIZE_BYTES:].hex()}


def _step_folder(step: int) -> str:
    return f"step-{step:09d}"


def _statistics_file(rank: int) -> str:
    return f"statistics-{rank:05d}.safetensors"
