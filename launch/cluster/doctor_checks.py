"""From what the nodes say of themselves to the rows of `mcl doctor`'s table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

OK, NOTE, FAIL = "ok", "note", "FAIL"
ALL = "all"  # in place of a node's name
CLOCK_SECONDS = 1.0  # that logs of several nodes may be apart, and still be read side by side
DISK_BYTES = 2 * 2**30  # a few checkpoints of the full-size model
SHARED_MEMORY_BYTES = 128 * 2**20  # containers come with 64 MiB, too little for NCCL and DALI
LOCKED_MEMORY_BYTES = 2**30  # that InfiniBand's buffers may need; hosts made for it set no limit
LINK_BYTES_PER_SECOND = 100e6  # what Ethernet of 1 Gbit/s brings
MEBIBYTE = 2**20


class Row(NamedTuple):
    """One line of the table; `remedy` is empty unless `state` is FAIL."""

    check: str
    node: str
    state: str
    found: str
    remedy: str = ""


Facts = dict[str, Any]
Nodes = Mapping[str, Facts]


def rows(nodes: Nodes, slots: Mapping[str, int], clock_bounds: Mapping[str, tuple[float, float]]) -> Iterator[Row]:
    """What the nodes' answers say, each alone and compared with the first.

    Args:
        nodes: answers of `launch.cluster.doctor_node` by node.
        slots: ranks to run on each, where a hostfile says so.
        clock_bounds: between which each node's clock is ahead of ours, in seconds.
    """
    yield from _foreign(nodes)
    yield from _versions(nodes)
    yield from _same("code", nodes, lambda facts: facts["code"], "install the same mcl-dist on every node")
    yield from _torch(nodes)
    yield from _gpus({name: facts for name, facts in nodes.items() if not facts["torch_error"]}, slots)
    yield from _clocks(clock_bounds)
    if len(nodes) > 1:
        yield from _each("name", nodes, _own_name)
    yield from _each("shared memory", nodes, _shared_memory)
    yield from _each("locked memory", nodes, _locked_memory)
    yield from _each("ports", nodes, _ports)
    yield from _sets(nodes)
    yield from _folders(nodes)


def _each(check: str, nodes: Nodes, look: Callable[[Facts], tuple[str, str]]) -> Iterator[Row]:
    """A row for each node whose look has a remedy; one row for all when none has."""
    looks = {name: look(facts) for name, facts in nodes.items()}
    failed = {name: result for name, result in looks.items() if result[1]}
    for name, (found, remedy) in failed.items():
        yield Row(check, name, FAIL, found, remedy)
    for found in dict.fromkeys(found for found, remedy in looks.values() if not remedy and found):
        alike = [name for name, result in looks.items() if result[0] == found]
        yield Row(check, ALL if len(alike) == len(nodes) else ", ".join(alike), OK, found)


def _same(check: str, nodes: Nodes, of: Callable[[Facts], str], remedy: str) -> Iterator[Row]:
    first = next(iter(nodes))
    expected = of(nodes[first])
    others = {name: found for name, facts in nodes.items() if (found := of(facts)) != expected}
    for name, found in others.items():
        yield Row(check, name, FAIL, f"{found}, but {expected} on {first}", remedy)
    if not others:
        yield Row(check, ALL, OK, expected)


def _foreign(nodes: Nodes) -> Iterator[Row]:
    for name, facts in nodes.items():
        for package, where in facts["foreign"].items():
            remedy = (
                "remove it from PYTHONPATH and the working folder, or install mcl-dist in an environment of its own"
            )
            if where == "nothing":
                remedy = "install mcl-dist into this Python"
            yield Row("packages", name, FAIL, f"`{package}` is not ours: {where}", remedy)
    if not any(facts["foreign"] for facts in nodes.values()):
        yield Row("packages", ALL, OK, "ours are found")


def _versions(nodes: Nodes) -> Iterator[Row]:
    libraries = dict.fromkeys(library for facts in nodes.values() for library in facts["versions"])
    differ = False
    for library in libraries:
        remedy = f"install the same {library} on every node, with constraints.txt"
        for row in _same(library, nodes, partial(_version, library), remedy):
            if row.state == FAIL:
                differ = True
                yield row
            elif row.found == "missing":
                differ = True
                yield Row(library, ALL, FAIL, "missing", "install mcl-dist with its extra cuda13 or cuda12")
    if not differ:
        versions = next(iter(nodes.values()))["versions"]
        yield Row("versions", ALL, OK, ", ".join(f"{library} {version}" for library, version in versions.items()))


def _version(library: str, facts: Facts) -> str:
    return str(facts["versions"].get(library, "missing"))


def _torch(nodes: Nodes) -> Iterator[Row]:
    for name, facts in nodes.items():
        if facts["torch_error"]:
            remedy = "install torch anew in this Python (make install); no data, GPU or link of this node is looked at"
            yield Row("import torch", name, FAIL, facts["torch_error"], remedy)


def _gpus(nodes: Nodes, slots: Mapping[str, int]) -> Iterator[Row]:
    if nodes and not any(facts["gpus"] for facts in nodes.values()):
        yield Row("GPUs", ALL, NOTE, "none: ranks run on CPUs")
        return
    driver = "check the driver (nvidia-smi), CUDA_VISIBLE_DEVICES and that this torch is a CUDA build"

    def look(facts: Facts) -> tuple[str, str]:
        gpus = facts["gpus"]
        found = ", ".join(f"{gpus.count(model)}× {model}" for model in dict.fromkeys(gpus)) or "none"
        wanted = slots.get(facts["node"], 1)
        return (found, "") if len(gpus) >= wanted else (f"{found} for {wanted} ranks", driver)

    yield from _each("GPUs", {name: facts | {"node": name} for name, facts in nodes.items()}, look)


def _clocks(bounds: Mapping[str, tuple[float, float]]) -> Iterator[Row]:
    wrong = False
    for name, (least, most) in bounds.items():
        apart = least if least > 0 else min(most, 0.0)
        if abs(apart) > CLOCK_SECONDS:
            wrong = True
            direction = "ahead of" if apart > 0 else "behind"
            found = f"at least {abs(apart):.1f} s {direction} this host's"
            yield Row("clock", name, FAIL, found, "set it by NTP (chrony, systemd-timesyncd)")
    if bounds and not wrong:
        surely = max(max(abs(least), abs(most)) for least, most in bounds.values())
        yield Row("clock", ALL, OK, f"within {surely:.1f} s of this host's")


def _own_name(facts: Facts) -> tuple[str, str]:
    address = facts["address"]
    if address is None:
        return f"{facts['hostname']} has no address", "name it in /etc/hosts with its address on the nodes' network"
    if address.startswith("127."):
        return (
            f"{facts['hostname']} is {address} to itself, where gloo then listens",
            "give it its network address in /etc/hosts, or set GLOO_SOCKET_IFNAME to the network's interface",
        )
    return "each knows its own address", ""


def _shared_memory(facts: Facts) -> tuple[str, str]:
    found = facts["shared_memory_bytes"]
    if found < SHARED_MEMORY_BYTES:
        return (
            f"{size(found)} free in /dev/shm",
            f"{size(SHARED_MEMORY_BYTES)} or more: --shm-size of docker, an emptyDir of medium Memory, or free some",
        )
    return "enough in /dev/shm", ""


def _locked_memory(facts: Facts) -> tuple[str, str]:
    limit = facts["locked_memory_bytes"]
    if not facts["infiniband"]:
        return "no InfiniBand, so no matter", ""
    if 0 <= limit < LOCKED_MEMORY_BYTES:
        return (
            f"limit {size(limit)} beside InfiniBand",
            "ulimit -l unlimited: in limits.conf, the unit or the container",
        )
    return "enough for InfiniBand", ""


def _ports(facts: Facts) -> tuple[str, str]:
    if closed := facts["closed_ports"]:
        found = ", ".join(f"{where} {reason}" for where, reason in closed.items())
        return found, "end what listens there, or choose an address of this node and a port that is free on all"
    return "free", ""


def _sets(nodes: Nodes) -> Iterator[Row]:
    for index in range(max(len(facts["sets"]) for facts in nodes.values())):
        of_nodes = {name: facts["sets"][index] for name, facts in nodes.items() if facts["sets"]}

        def look(found: Facts) -> tuple[str, str]:
            problem = found["error"]
            remedy = "make it readable from this node: mount it there, or give the node its credentials"
            return (problem, remedy) if problem else (f"{found['url']} is read", "")

        yield from _each("data", of_nodes, look)
        read = {name: found for name, found in of_nodes.items() if not found["error"]}
        if len({found["digest"] for found in read.values()}) > 1:
            remedy = "copy the same set to every node, or name one that all share"
            yield from _same("data", read, lambda found: f"{found['url']} (manifest {found['digest']})", remedy)


def _folders(nodes: Nodes) -> Iterator[Row]:
    names = dict.fromkeys(name for facts in nodes.values() for name in facts["folders"])
    for folder in names:

        def look(facts: Facts, folder: str = folder) -> tuple[str, str]:
            found = facts["folders"].get(folder)
            if found is None:
                return "", ""
            if found["error"]:
                return found["error"], "make it writable for this user on this node, or choose another folder"
            free = found["free_bytes"]
            if free is not None and free < DISK_BYTES:
                return f"{found['url']}: {size(free)} free", f"free some: {size(DISK_BYTES)} or more are needed"
            return f"{found['url']}: written and read back", ""

        yield from _each(folder, nodes, look)


def shared(seen: Mapping[str, Mapping[str, Iterable[str]]], names: Mapping[str, str]) -> Iterator[Row]:
    """Whether a folder is one and the same on all nodes.

    Args:
        seen: by node and folder, whose files it sees there.
        names: of the folders that are local paths, by what they are for.
    """
    for folder, path in names.items():
        unseen = {node: sorted(set(seen) - set(folders.get(folder, ()))) for node, folders in seen.items()}
        apart = [node for node, others in unseen.items() if others]
        if not apart:
            yield Row(f"shared {folder}", ALL, NOTE if folder == "cache" else OK, f"{path} is one folder for all")
        elif folder == "checkpoints":
            for node in apart:
                found = f"{path} there is not that of {', '.join(unseen[node])}"
                yield Row(
                    f"shared {folder}", node, FAIL, found, "put checkpoint.folder on a shared file system or in a store"
                )
        else:
            yield Row(f"shared {folder}", ALL, NOTE, f"{path} is another folder on each node")


def link(answers: Mapping[str, list[Facts]], world: int, on_gpus: bool) -> Iterator[Row]:
    """What the all-reduce came to, by node and rank."""
    backend = "NCCL" if on_gpus else "gloo"
    variable = "NCCL_SOCKET_IFNAME" if on_gpus else "GLOO_SOCKET_IFNAME"
    ended = [rank for ranks in answers.values() for rank in ranks]
    for node, ranks in answers.items():
        errors = [rank["error"] for rank in ranks if rank["error"]]
        if errors or not ranks:
            remedy = f"open all ports between the nodes, and set {variable} to the interface that joins them"
            yield Row("all-reduce", node, FAIL, errors[0] if errors else "no answer", remedy)
    if len(ended) < world or any(rank["error"] for rank in ended):
        return
    if world == 1:
        yield Row("all-reduce", ALL, OK, f"one rank by {backend}: it starts, and has nobody to send to")
        return
    speed = min((rank["bytes_per_second"] for rank in ended), default=math.inf)
    seconds = max(rank["seconds"] for rank in ended)
    found = f"{world} ranks by {backend}: 16.0 MiB in {seconds * 1e3:.0f} ms, {speed / 1e6:.0f} MB/s"
    if len(answers) > 1 and speed < LINK_BYTES_PER_SECOND:
        remedy = f"check the links' speed (ethtool) and that {variable} names the fast one; 100 MB/s is 1 Gbit/s"
        yield Row("all-reduce", ALL, FAIL, found, remedy)
    else:
        yield Row("all-reduce", ALL, OK, found)


def size(num_bytes: int) -> str:
    """Bytes as a person reads them."""
    if num_bytes >= 2**30:
        return f"{num_bytes / 2**30:.1f} GiB"
    return f"{num_bytes / MEBIBYTE:.1f} MiB"
