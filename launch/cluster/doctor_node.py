"""What one node has to say of itself to `mcl doctor`: a request as JSON on its input, the answer on its output.

Run by its path, not as a module, so that it can name another package that hides ours.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import socket
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("mcl_dist", "dataloading", "monitoring", "launch")
LIBRARIES = ("torch", "deepspeed", "webdataset")
DALI = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")
STORE_SECONDS = 15.0  # that a store which does not answer is asked again
INFINIBAND = Path("/sys/class/infiniband")
SHARED_MEMORY = Path("/dev/shm")


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """All that is looked at on the node; see `launch.cli.doctor` for the request."""
    started = time.time()
    foreign = _foreign()
    gpus, torch_error = _gpus()
    cannot_read = bool(foreign or torch_error)
    return {
        "hostname": socket.gethostname(),
        "address": _address(),
        "foreign": foreign,
        "versions": _versions(),
        "code": _code_digest(),
        "gpus": gpus,
        "torch_error": torch_error,
        "shared_memory_bytes": _free(SHARED_MEMORY),
        "locked_memory_bytes": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        "infiniband": sorted(path.name for path in INFINIBAND.iterdir()) if INFINIBAND.is_dir() else [],
        "sets": [] if cannot_read else [_read(url) for url in request["sets"]],
        "folders": {} if foreign else {name: _written(url, request) for name, url in request["folders"].items()},
        "closed_ports": _closed_ports(request["listeners"], max(1, len(gpus))),
        "free_port": _free_port(),
        "started": started,
        "ended": time.time(),
    }


def _foreign() -> dict[str, str]:
    """Where Python finds packages of ours that are not those beside this file."""
    try:
        from mcl_dist.__main__ import foreign
    except ImportError:
        return {"mcl_dist": "nothing"}
    return {package: where for package in PACKAGES if (where := foreign(package))}


def _versions() -> dict[str, str]:
    found = {name: _version(name) for name in (*LIBRARIES, "mcl-dist")}
    dali = next((name for name in DALI if _version(name) != "missing"), DALI[0])
    return {"python": platform.python_version(), **found, dali: _version(dali)}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name) or "missing"  # none where an installation broke off
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _code_digest() -> str:
    digest = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _gpus() -> tuple[list[str], str | None]:
    """Names of the GPUs, and why torch, which knows them, cannot be imported: it or a library of its own is missing."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return [], f"{type(error).__name__}: {error}".splitlines()[0]
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())], None


def _address() -> str | None:
    """What this host's own name means to it, which is where gloo listens."""
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return None


def _read(url: str) -> dict[str, Any]:
    from dataloading.shards.format import MANIFEST, manifest_from
    from mcl_dist.errors import UserError
    from mcl_dist.storage.folder import Folder
    from mcl_dist.storage.retry import RetryPolicy
    from mcl_dist.storage.store_requests import without_credentials

    name = without_credentials(url)
    try:
        folder = Folder(url, RetryPolicy(STORE_SECONDS))
        data = folder.read(MANIFEST)
        manifest = manifest_from(data, f"{name}/{MANIFEST}")
        for shard in manifest.shards[:1]:
            folder.head(shard.name, 1)
    except UserError as error:
        return {"url": name, "error": without_credentials(str(error)), "digest": None}
    return {"url": name, "error": None, "digest": hashlib.sha256(data).hexdigest()[:12]}


def _written(url: str, request: dict[str, Any]) -> dict[str, Any]:
    """Whether a file can be written, read and removed there; a local one stays for the other nodes to see."""
    from mcl_dist.errors import UserError
    from mcl_dist.storage.folder import Folder
    from mcl_dist.storage.retry import RetryPolicy
    from mcl_dist.storage.store_requests import without_credentials

    found: dict[str, Any] = {"url": without_credentials(url), "error": None, "local": None, "free_bytes": None}
    try:
        folder = Folder(url, RetryPolicy(STORE_SECONDS))
        if folder.is_local:
            place = nearest(Path(folder.path("")))
            folder = Folder(str(place))
            found |= {"local": str(place), "free_bytes": _free(place)}
        token = f".mcl-doctor-{request['nonce']}-{request['node']}"
        folder.write(token, request["node"].encode())
        if folder.read(token) != request["node"].encode():
            found["error"] = f"{found['url']}: reads back other bytes than were written; the store cannot be used"
        if not folder.is_local:
            folder.remove(token)
    except UserError as error:
        found["error"] = without_credentials(str(error))
    return found


def nearest(path: Path) -> Path:
    """The folder, or the nearest one above it that is there already."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _free(path: Path) -> int:
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return 0


def _closed_ports(listeners: list[dict[str, Any]], num_ranks: int) -> dict[str, str]:
    """Why ports cannot be listened at, by address and port.

    Args:
        listeners: `address`, `port`, and how many in a row from there; None is one a rank.
        num_ranks: that run here unless told otherwise.
    """
    found = {}
    for listener in listeners:
        for port in range(listener["port"], listener["port"] + (listener["count"] or num_ranks)):
            if reason := _closed(listener["address"], port):
                found[f"{listener['address']}:{port}"] = reason
    return found


def _closed(address: str, port: int) -> str | None:
    """Why nobody can listen there, in the way of `monitoring.http.server`'s server; None where one can."""
    try:
        family = socket.getaddrinfo(address or None, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: closed connections may linger
            probe.bind((address, port))
    except OSError as error:
        return error.strerror or str(error)
    except OverflowError:
        return "no such port"
    return None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port


if __name__ == "__main__":
    sys.path.pop(0)  # our own folder, which Python puts there for a program run by its path
    print(json.dumps(answer(json.load(sys.stdin))), flush=True)
    os._exit(0)
