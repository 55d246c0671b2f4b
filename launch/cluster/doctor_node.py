"""The facts of one node for `mcl doctor`: a JSON request on standard input, the facts as JSON on standard output.

The doctor runs this file by its path, not as a module, so that it works even if another package hides ours.
"""

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
STORE_SECONDS = 15.0  # of retries when a store does not answer
INFINIBAND = Path("/sys/class/infiniband")
SHARED_MEMORY = Path("/dev/shm")


def collect_facts(request: dict[str, Any]) -> dict[str, Any]:
    """All facts of this node; `Diagnostics.node_request` makes the request."""
    started = time.time()
    foreign = _foreign_packages()
    gpus, torch_error = _gpus()
    cannot_read_sets = bool(foreign or torch_error)
    return {
        "hostname": socket.gethostname(),
        "address": _address(),
        "foreign": foreign,
        "versions": _versions(),
        "code": _code_digest(),
        "gpus": gpus,
        "torch_error": torch_error,
        "shared_memory_bytes": _free_bytes(SHARED_MEMORY),
        "locked_memory_bytes": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        "infiniband": sorted(path.name for path in INFINIBAND.iterdir()) if INFINIBAND.is_dir() else [],
        "sets": [] if cannot_read_sets else [_check_set(url) for url in request["sets"]],
        "folders": {} if foreign else {name: _check_folder(url, request) for name, url in request["folders"].items()},
        "closed_ports": _closed_ports(request["listeners"], max(1, len(gpus))),
        "free_port": _free_port(),
        "started": started,
        "ended": time.time(),
    }


def _foreign_packages() -> dict[str, str]:
    """Packages with our names that Python finds elsewhere than beside this file, and where."""
    try:
        from mcl_dist.__main__ import foreign
    except ImportError:
        return {"mcl_dist": "nothing"}
    return {package: where for package in PACKAGES if (where := foreign(package))}


def _versions() -> dict[str, str]:
    versions = {name: _version(name) for name in (*LIBRARIES, "mcl-dist")}
    dali = next((name for name in DALI if _version(name) != "missing"), DALI[0])
    return {"python": platform.python_version(), **versions, dali: _version(dali)}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name) or "missing"  # None after an interrupted installation
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _code_digest() -> str:
    digest = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _gpus() -> tuple[list[str], str | None]:
    """Names of the GPUs, and the error if torch, which lists them, or a library that it needs cannot be imported."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return [], f"{type(error).__name__}: {error}".splitlines()[0]
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())], None


def _address() -> str | None:
    """The address of this host's own name, where gloo listens."""
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return None


def _check_set(url: str) -> dict[str, Any]:
    """Whether a shard set's manifest and first shard are readable."""
    from dataloading.shards.format import MANIFEST, parse_manifest
    from mcl_dist.errors import UserError
    from mcl_dist.storage.folder import Folder
    from mcl_dist.storage.retry import RetryPolicy
    from mcl_dist.storage.store_requests import without_credentials

    name = without_credentials(url)
    try:
        folder = Folder(url, RetryPolicy(STORE_SECONDS))
        data = folder.read(MANIFEST)
        for shard in parse_manifest(data, f"{name}/{MANIFEST}").shards[:1]:
            folder.head(shard.name, 1)
    except UserError as error:
        return {"url": name, "error": without_credentials(str(error)), "digest": None}
    return {"url": name, "error": None, "digest": hashlib.sha256(data).hexdigest()[:12]}


def _check_folder(url: str, request: dict[str, Any]) -> dict[str, Any]:
    """Whether a marker file can be written, read and removed; a local one stays, for the other nodes to see."""
    from mcl_dist.errors import UserError
    from mcl_dist.storage.folder import Folder
    from mcl_dist.storage.retry import RetryPolicy
    from mcl_dist.storage.store_requests import without_credentials

    facts: dict[str, Any] = {"url": without_credentials(url), "error": None, "local": None, "free_bytes": None}
    try:
        folder = Folder(url, RetryPolicy(STORE_SECONDS))
        if folder.is_local:
            path = nearest_folder(Path(folder.path("")))
            folder = Folder(str(path))
            facts |= {"local": str(path), "free_bytes": _free_bytes(path)}
        marker, content = f".mcl-doctor-{request['nonce']}-{request['node']}", request["node"].encode()
        folder.write(marker, content)
        if folder.read(marker) != content:
            facts["error"] = f"{facts['url']}: returns other bytes than were written; use another store"
        if not folder.is_local:
            folder.remove(marker)
    except UserError as error:
        facts["error"] = without_credentials(str(error))
    return facts


def nearest_folder(path: Path) -> Path:
    """The folder, or its nearest parent that exists."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _free_bytes(path: Path) -> int:
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return 0


def _closed_ports(listeners: list[dict[str, Any]], num_ranks: int) -> dict[str, str]:
    """Ports that cannot be listened on, as `address:port`, and why.

    A listener is an `address`, a first `port` and a `count` of consecutive ports, None for one each rank.
    """
    closed = {}
    for listener in listeners:
        for port in range(listener["port"], listener["port"] + (listener["count"] or num_ranks)):
            if reason := _listen_error(listener["address"], port):
                closed[f"{listener['address']}:{port}"] = reason
    return closed


def _listen_error(address: str, port: int) -> str | None:
    """Why a server such as `monitoring.http.server` cannot listen there; None if it can."""
    try:
        family = socket.getaddrinfo(address or None, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: old connections linger
            probe.bind((address, port))
    except OSError as error:
        return error.strerror or str(error)
    except OverflowError:
        return "no such port"
    return None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.path.pop(0)  # our own folder, which Python adds for a program that is run by its path
    print(json.dumps(collect_facts(json.load(sys.stdin))), flush=True)
    os._exit(0)
