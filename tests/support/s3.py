"""An S3 store on the loopback: OpenStack Swift with its S3 interface, four daemons on one folder."""

from __future__ import annotations

import getpass
import http.client
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

USER = "test:tester"
SECRET = "canary-5e1ad0c7b9"  # must never be seen outside the environment
STARTS_WITHIN = 60.0
SERVERS = ("object", "container", "account", "proxy")
RINGS = """
import sys
from swift.common.ring import RingBuilder
folder, *ports = sys.argv[1:]
for name, port in zip(("object", "container", "account"), ports):
    builder = RingBuilder(4, 1, 0)
    builder.add_dev(dict(id=0, region=1, zone=1, ip="127.0.0.1", port=int(port), device="disk", weight=1))
    builder.rebalance()
    builder.get_ring().save(f"{folder}/{name}.ring.gz")
"""
COMMON = """
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
user = {user}
swift_dir = {folder}
devices = {folder}/devices
mount_check = false
workers = 0
log_address = {folder}/no-syslog
"""
BACKEND = """
[pipeline:main]
pipeline = {name}-server

[app:{name}-server]
use = egg:swift#{name}
"""
PROXY = f"""
[pipeline:main]
pipeline = catch_errors healthcheck s3api tempauth bulk slo proxy-server

[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true

[filter:tempauth]
use = egg:swift#tempauth
user_{USER.replace(":", "_")} = {SECRET} .admin

[filter:s3api]
use = egg:swift#s3api
location = us-east-1

[filter:catch_errors]
use = egg:swift#catch_errors
[filter:healthcheck]
use = egg:swift#healthcheck
[filter:bulk]
use = egg:swift#bulk
[filter:slo]
use = egg:swift#slo
"""


@dataclass(frozen=True)
class S3Store:
    """A running store; `environment` is all that an S3 client needs."""

    folder: Path
    port: int  # of the proxy, which speaks S3
    daemons: dict[str, subprocess.Popen[bytes]]

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": USER,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    @property
    def answers(self) -> bool:
        return _is_healthy(self.port)

    def kill_proxy(self) -> None:
        """Kill it in whatever it is doing; what is stored stays, and nobody can ask for it."""
        self.daemons["proxy"].kill()
        self.daemons["proxy"].wait()

    def start_proxy(self) -> None:
        """Start it again at the same port; returns before it answers."""
        self.daemons["proxy"] = _started(self.folder, "proxy")


@contextmanager
def running_store(folder: Path) -> Iterator[S3Store]:
    """Start the daemons with their data below `folder`; end them with the block."""
    ports = _free_ports(len(SERVERS))
    (folder / "devices" / "disk").mkdir(parents=True)
    (folder / "swift.conf").write_text("[swift-hash]\nswift_hash_path_suffix = tests\n")
    subprocess.run([sys.executable, "-c", RINGS, folder, *map(str, ports[:3])], check=True)
    for name, port in zip(SERVERS, ports, strict=True):
        conf = folder / f"{name}.conf"
        conf.touch(mode=0o600)
        body = PROXY if name == "proxy" else BACKEND.format(name=name)
        conf.write_text(COMMON.format(port=port, user=getpass.getuser(), folder=folder) + body)
    store = S3Store(folder, ports[-1], {})
    try:
        for name in SERVERS:
            store.daemons[name] = _started(folder, name)
        _wait_until_healthy(store)
        yield store
    finally:
        for daemon in store.daemons.values():
            _end(daemon)


def _started(folder: Path, name: str) -> subprocess.Popen[bytes]:
    program = Path(sys.executable).with_name(f"swift-{name}-server")
    with (folder / f"{name}.log").open("ab") as log:
        command = [program, folder / f"{name}.conf", "--verbose"]
        return subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)


def _end(daemon: subprocess.Popen[bytes]) -> None:
    daemon.terminate()
    try:
        daemon.wait(10)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()


def _wait_until_healthy(store: S3Store) -> None:
    deadline = time.monotonic() + STARTS_WITHIN
    while not store.answers:
        dead = [name for name, daemon in store.daemons.items() if daemon.poll() is not None]
        if dead or time.monotonic() > deadline:
            logs = "\n".join((store.folder / f"{name}.log").read_text() for name in dead or SERVERS)
            raise RuntimeError(f"the S3 store does not start: {logs}")
        os.sched_yield()


def _is_healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/healthcheck")
        return connection.getresponse().status == http.HTTPStatus.OK
    except OSError:
        return False
    finally:
        connection.close()


def _free_ports(number: int) -> list[int]:
    with ExitStack() as sockets:
        bound = [sockets.enter_context(socket.socket()) for _ in range(number)]
        for one in bound:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in bound]
