"""Virtual hosts on this machine: network, process and mount namespaces on one bridge, with an sshd in each.

Everything is inside namespaces that end with their first process, so nothing outlives the test and nothing outside
changes.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.supervision.processes import wait_until

PROGRAMS = ("sshd", "ssh", "ssh-keygen", "ip", "unshare", "nsenter", "setpriv", "pdsh")
SEARCH_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin:/sbin"
NETWORK = "10.77.0"
SSH_PORT = 2222
START_SECONDS = 10.0
SHARED_MEMORY = "512m"
# The first process of a host, which also reaps orphaned processes. It waits for its network.
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
    """Why this machine cannot run virtual hosts; None if it can."""
    if os.geteuid():
        return "virtual hosts need root"
    absent = [program for program in PROGRAMS if not shutil.which(program, path=SEARCH_PATH)]
    if absent:
        return f"virtual hosts need {', '.join(absent)} (openssh-server, iproute2, util-linux, pdsh)"
    probe = subprocess.run(["unshare", "--net", "--pid", "--mount", "--uts", "--fork", "true"], check=False)
    return "this machine cannot create namespaces" if probe.returncode else None


@dataclass
class Host:
    """One host, up or down.

    Attributes:
        name: on the network.
        folder: of its keys and logs.
        environment: that its sshd sets in every session, from the next `boot` on.
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
        """Address in the bridge's network."""
        return f"{NETWORK}.{self.number}"

    def boot(self) -> None:
        """Start, with the same name, address and keys each time."""
        self._configure()
        script = BOOT.format(
            folder=self.folder,
            own=self.rig.own,
            name=self.name,
            shared_memory=SHARED_MEMORY,
            sshd=shutil.which("sshd", path=SEARCH_PATH),
        )
        # The kernel kills unshare when the test ends, and the host when unshare ends.
        unshare = ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--pid", "--mount", "--uts", "--fork"]
        with (self.folder / "boot.log").open("ab") as log:
            self._shell = subprocess.Popen(
                [*unshare, "--kill-child", "--propagation", "private", "bash", "-c", script],
                stdin=subprocess.PIPE,
                stderr=log,
                env={"PATH": SEARCH_PATH, "HOME": os.environ.get("HOME", "/root")},
            )
        self.first = _first_child(self._shell.pid)
        _wait_until(lambda: self._in_own_network(), f"{self.name} has no namespaces")
        link, mac = f"to-{self.name}", f"02:00:00:00:00:{self.number:02x}"
        self.rig.head.run(
            f"ip link add {link} type veth peer name eth0 address {mac} netns {self.first} && "
            f"ip link set {link} master bridge up"
        )
        self.run(f"ip address add {self.address}/24 dev eth0 && ip link set eth0 up", namespaces=("net",))
        assert self._shell.stdin is not None
        self._shell.stdin.write(b"\n")
        self._shell.stdin.close()
        _wait_until(self.answers, f"the sshd of {self.name} does not answer: {self.folder / 'sshd.log'}")

    def answers(self) -> bool:
        """Whether its sshd accepts connections from the head."""
        probe = f"exec 3<>/dev/tcp/{self.address}/{SSH_PORT}"
        return self.rig.head.popen(f"timeout 1 bash -c '{probe}' 2>/dev/null").wait() == 0

    def link_down(self) -> None:
        """Cut its link; no connection is closed."""
        self.rig.head.run(f"ip link set to-{self.name} down")

    def link_up(self) -> None:
        """Restore its link."""
        self.rig.head.run(f"ip link set to-{self.name} up")

    def kill(self) -> None:
        """Lose power: kill every process at once; no connection is closed."""
        if self._shell is None or self.first is None:
            return
        self.link_down()
        with suppress(ProcessLookupError):
            os.kill(self.first, signal.SIGKILL)
        self._shell.wait(START_SECONDS)
        # The kernel removes its end of the link only after a while.
        self.rig.head.run(f"ip link delete to-{self.name} 2>/dev/null || true")
        self.first = self._shell = None

    def run(self, command: str, namespaces: Iterable[str] = ("net", "pid", "mount", "uts")) -> str:
        """Run a shell command on this host; returns its output, raises if it fails."""
        return _run([*self._enter(namespaces), "bash", "-c", command])

    def popen(self, command: str, **options: Any) -> subprocess.Popen[Any]:
        """Start a shell command on this host."""
        return subprocess.Popen([*self._enter(("net", "pid", "mount", "uts")), "bash", "-c", command], **options)

    def processes(self) -> dict[int, str]:
        """Command lines of its processes without its boot script and sshd, by the process ids of this machine."""
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
    """The head node: on the hosts' network, with this machine's processes and files."""

    work: Path
    _holder: subprocess.Popen[bytes] | None = None

    def boot(self, hosts_file: str) -> None:
        """Create the bridge."""
        (self.work / "hosts").write_text(hosts_file)
        unshare = ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--mount", "--uts", "--propagation", "private"]
        self._holder = subprocess.Popen([*unshare, "sleep", "infinity"])
        pid = self._holder.pid
        _wait_until(lambda: _namespace(pid, "uts") != _namespace("self", "uts"), "the head has no namespaces")
        self.run(
            f"mount --bind {self.work}/hosts /etc/hosts && hostname head && ip link set lo up && "
            f"ip link add bridge type bridge && ip address add {NETWORK}.254/24 dev bridge && ip link set bridge up"
        )

    def stop(self) -> None:
        """Remove the bridge."""
        if self._holder:
            self._holder.kill()
            self._holder.wait(START_SECONDS)

    def run(self, command: str) -> str:
        """Run a shell command on the head; returns its output, raises if it fails."""
        return _run([*self.enter(), "bash", "-c", command])

    def popen(self, command: str | list[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a command on the head; its process id is that of the command itself."""
        arguments = ["bash", "-c", command] if isinstance(command, str) else command
        return subprocess.Popen([*self.enter(), *arguments], **options)

    def enter(self) -> list[str]:
        """The prefix of a command that runs it on the head."""
        assert self._holder is not None
        return ["nsenter", "--target", str(self._holder.pid), "--net", "--mount", "--uts"]


class Rig:
    """Hosts `node1`, `node2`, … and the head, which reaches them over ssh.

    Attributes:
        own: path of a folder that differs from host to host; all other folders are shared.
        ssh_config: for ssh to the hosts.
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
        """The content of /etc/hosts, with other addresses for some names."""
        addresses = {"localhost": "127.0.0.1", "head": f"{NETWORK}.254"}
        addresses |= {host.name: host.address for host in self.hosts} | dict(changes or {})
        return "".join(f"{address} {name}\n" for name, address in addresses.items())

    def prepare(self) -> None:
        """Create keys and configurations."""
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
    """Hosts that run until the block ends."""
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
    _wait_until(lambda: children.read_text().split(), "unshare starts nothing")
    return int(children.read_text().split()[0])


def _run(command: list[str]) -> str:
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{shlex.join(command)}: {result.returncode}: {result.stderr}{result.stdout}")
    return result.stdout


def _wait_until(condition: Callable[[], object], problem: str) -> None:
    if not wait_until(condition, START_SECONDS):
        raise RuntimeError(problem)
