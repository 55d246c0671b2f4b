"""Hosts of their own on this machine: network, process and mount namespaces on one bridge, an sshd in each.

All of it lives in namespaces that end with their first process, so that nothing of it outlives whoever made it, and
nothing outside of them changes.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROGRAMS = ("sshd", "ssh", "ssh-keygen", "ip", "unshare", "nsenter", "setpriv", "pdsh")
SEARCHED = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin:/sbin"
NETWORK = "10.77.0"
SSH_PORT = 2222
STARTS_WITHIN = 10.0
SHARED_MEMORY = "512m"
# Run as the first process of a host, which also reaps what loses its parent. It waits for its network.
BOOT = """
set -e
mount -t proc proc /proc
mount -t tmpfs -o mode=755 none /run
mkdir /run/sshd
mount -t tmpfs -o size={shared_memory} none /dev/shm
mount --bind {folder}/hosts /etc/hosts
mount --bind {folder}/own {own}
hostname {name}
ip link set lo up
read -r network_is_up
{sshd} -D -e -f {folder}/sshd_config 2>>{folder}/sshd.log &
while :; do wait; sleep 1; done
"""
SSHD = """
Port {port}
HostKey {folder}/host_key
AuthorizedKeysFile {work}/user_key.pub
PidFile none
UsePAM no
StrictModes no
PermitRootLogin yes
PasswordAuthentication no
LogLevel ERROR
{environment}
"""
SSH = """
Host node*
  Port {port}
  User root
  IdentityFile {work}/user_key
  IdentitiesOnly yes
  UserKnownHostsFile {work}/known_hosts
  StrictHostKeyChecking yes
"""


def missing() -> str | None:
    """Why there can be no such hosts here; None where there can."""
    if os.geteuid():
        return "hosts made of namespaces need root"
    absent = [program for program in PROGRAMS if not shutil.which(program, path=SEARCHED)]
    if absent:
        return f"hosts made of namespaces need {', '.join(absent)} (openssh-server, iproute2, util-linux, pdsh)"
    probe = subprocess.run(["unshare", "--net", "--pid", "--mount", "--uts", "--fork", "true"], check=False)
    return "namespaces cannot be made here" if probe.returncode else None


@dataclass
class Host:
    """One host, up or down.

    Attributes:
        name: by which the others know it.
        folder: of its keys and logs.
        environment: what its sshd sets in every session, from the next `boot` on.
    """

    rig: Rig
    name: str
    number: int
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    first: int | None = None
    _shell: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """In the bridge's network."""
        return f"{NETWORK}.{self.number}"

    def boot(self) -> None:
        """Come up, with the same name, address and keys as ever."""
        self._configure()
        script = BOOT.format(
            folder=self.folder,
            own=self.rig.own,
            name=self.name,
            shared_memory=SHARED_MEMORY,
            sshd=shutil.which("sshd", path=SEARCHED),
        )
        # The kernel ends unshare with the test, and the host with unshare.
        words = ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--pid", "--mount", "--uts", "--fork"]
        with (self.folder / "boot.log").open("ab") as log:
            self._shell = subprocess.Popen(
                [*words, "--kill-child", "--propagation", "private", "bash", "-c", script],
                stdin=subprocess.PIPE,
                stderr=log,
                env={"PATH": SEARCHED, "HOME": os.environ.get("HOME", "/root")},
            )
        self.first = _first_child(self._shell.pid)
        _until(lambda: self._in_own_network(), f"{self.name} has no namespaces")
        link, mac = f"to-{self.name}", f"02:00:00:00:00:{self.number:02x}"
        self.rig.head.run(
            f"ip link add {link} type veth peer name eth0 address {mac} netns {self.first} && "
            f"ip link set {link} master bridge up"
        )
        self.run(f"ip address add {self.address}/24 dev eth0 && ip link set eth0 up", namespaces=("net",))
        assert self._shell.stdin is not None
        self._shell.stdin.write(b"\n")
        self._shell.stdin.close()
        _until(self.answers, f"the sshd of {self.name} does not answer: {self.folder / 'sshd.log'}")

    def answers(self) -> bool:
        """Whether its sshd takes connections from the head."""
        probe = f"exec 3<>/dev/tcp/{self.address}/{SSH_PORT}"
        return self.rig.head.popen(f"timeout 1 bash -c '{probe}' 2>/dev/null").wait() == 0

    def link_down(self) -> None:
        """Cut its cable: nobody is told."""
        self.rig.head.run(f"ip link set to-{self.name} down")

    def link_up(self) -> None:
        """Mend its cable."""
        self.rig.head.run(f"ip link set to-{self.name} up")

    def kill(self) -> None:
        """Lose power: every process is gone at once, and no connection is closed."""
        if self._shell is None or self.first is None:
            return
        self.link_down()
        with suppress(ProcessLookupError):
            os.kill(self.first, signal.SIGKILL)
        self._shell.wait(STARTS_WITHIN)
        # The kernel takes its end of the cable away only after a while.
        self.rig.head.run(f"ip link delete to-{self.name} 2>/dev/null || true")
        self.first = self._shell = None

    def run(self, command: str, namespaces: Iterable[str] = ("net", "pid", "mount", "uts")) -> str:
        """Output of a shell command on this host, which must succeed."""
        return _run([*self._enter(namespaces), "bash", "-c", command])

    def popen(self, command: str, **how: Any) -> subprocess.Popen[Any]:
        """Start a shell command on this host."""
        return subprocess.Popen([*self._enter(("net", "pid", "mount", "uts")), "bash", "-c", command], **how)

    def processes(self) -> dict[int, str]:
        """Command lines of what runs there, by the process ids of this machine; not those of its boot and its sshd."""
        if self.first is None:
            return {}
        own = _namespace(self.first, "pid")
        found = {}
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                if entry.name.isdigit() and _namespace(entry.name, "pid") == own and int(entry.name) != self.first:
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        return {
            pid: line
            for pid, line in found.items()
            if line and not line.startswith(("sshd:", "/usr/sbin/sshd", "sleep 1 "))
        }

    def _enter(self, namespaces: Iterable[str]) -> list[str]:
        return ["nsenter", "--target", str(self.first), *(f"--{name}" for name in namespaces)]

    def _in_own_network(self) -> bool:
        return _namespace(self.first, "net") != _namespace("self", "net")

    def _configure(self) -> None:
        (self.folder / "own").mkdir(parents=True, exist_ok=True)
        (self.folder / "hosts").write_text(self.rig.hosts_file())
        settings = " ".join(shlex.quote(f"{name}={value}") for name, value in self.environment.items())
        (self.folder / "sshd_config").write_text(
            SSHD.format(
                port=SSH_PORT,
                folder=self.folder,
                work=self.rig.work,
                environment=f"SetEnv {settings}" if settings else "",
            )
        )


@dataclass
class Head:
    """Where commands are given: on the hosts' network, with this machine's processes and files."""

    work: Path
    _holder: subprocess.Popen[bytes] | None = None

    def boot(self, hosts_file: str) -> None:
        """Make the bridge."""
        (self.work / "hosts").write_text(hosts_file)
        words = ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--mount", "--uts", "--propagation", "private"]
        self._holder = subprocess.Popen([*words, "sleep", "infinity"])
        pid = self._holder.pid
        _until(lambda: _namespace(pid, "uts") != _namespace("self", "uts"), "the head has no namespaces")
        self.run(
            f"mount --bind {self.work}/hosts /etc/hosts && hostname head && ip link set lo up && "
            f"ip link add bridge type bridge && ip address add {NETWORK}.254/24 dev bridge && ip link set bridge up"
        )

    def stop(self) -> None:
        """Take the bridge away."""
        if self._holder:
            self._holder.kill()
            self._holder.wait(STARTS_WITHIN)

    def run(self, command: str) -> str:
        """Output of a shell command on the head, which must succeed."""
        return _run([*self.enter(), "bash", "-c", command])

    def popen(self, command: str | list[str], **how: Any) -> subprocess.Popen[Any]:
        """Start a command on the head; its process id is that of the command itself."""
        words = ["bash", "-c", command] if isinstance(command, str) else command
        return subprocess.Popen([*self.enter(), *words], **how)

    def enter(self) -> list[str]:
        """What to put before a command so that it runs on the head."""
        assert self._holder is not None
        return ["nsenter", "--target", str(self._holder.pid), "--net", "--mount", "--uts"]


class Rig:
    """Hosts `node1`, `node2`, … and the head, from which each is reached by ssh.

    Attributes:
        own: path of a folder that is another one on every host; all others are the same.
        ssh_config: what ssh needs to reach the hosts.
        hostfile: of all hosts, with one slot each.
    """

    def __init__(self, work: Path, count: int) -> None:
        self.work, self.own = work, work / "own"
        self.ssh_config, self.hostfile = work / "ssh_config", work / "hostfile"
        self.head = Head(work)
        names = [f"node{number}" for number in range(1, count + 1)]
        self.hosts = [Host(self, name, number, work / name) for number, name in enumerate(names, 1)]

    def __getitem__(self, index: int) -> Host:
        return self.hosts[index]

    def hosts_file(self, changes: Mapping[str, str] | None = None) -> str:
        """What stands in /etc/hosts, with other addresses for some names."""
        addresses = {"localhost": "127.0.0.1", "head": f"{NETWORK}.254"}
        addresses |= {host.name: host.address for host in self.hosts} | dict(changes or {})
        return "".join(f"{address} {name}\n" for name, address in addresses.items())

    def prepare(self) -> None:
        """Make keys and configurations."""
        self.own.mkdir(parents=True)
        _keygen(self.work / "user_key")
        known = []
        for host in self.hosts:
            host.folder.mkdir()
            _keygen(host.folder / "host_key")
            known.append(f"[{host.name}]:{SSH_PORT} {(host.folder / 'host_key.pub').read_text()}")
        (self.work / "known_hosts").write_text("".join(known))
        self.ssh_config.write_text(SSH.format(port=SSH_PORT, work=self.work))
        self.hostfile.write_text("".join(f"{host.name} slots=1\n" for host in self.hosts))


@contextmanager
def running_hosts(work: Path, count: int = 2) -> Iterator[Rig]:
    """Hosts that are up until the block ends."""
    rig = Rig(work, count)
    rig.prepare()
    try:
        rig.head.boot(rig.hosts_file())
        for host in rig.hosts:
            host.boot()
        yield rig
    finally:
        for host in rig.hosts:
            host.kill()
        rig.head.stop()


def _keygen(path: Path) -> None:
    _run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(path)])


def _namespace(pid: int | str | None, kind: str) -> str:
    return str(Path(f"/proc/{pid}/ns/{kind}").readlink())


def _first_child(pid: int) -> int:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    _until(lambda: children.read_text().split(), "unshare starts nothing")
    return int(children.read_text().split()[0])


def _run(words: list[str]) -> str:
    result = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{shlex.join(words)}: {result.returncode}: {result.stderr}{result.stdout}")
    return result.stdout


def _until(condition: Any, otherwise: str) -> None:
    deadline = time.monotonic() + STARTS_WITHIN
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(otherwise)
        os.sched_yield()
