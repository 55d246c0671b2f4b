"""A long-running command on many hosts, over one pdsh or one ssh for each host: output, exit codes and outcomes."""

from __future__ import annotations

import json
import os
import queue
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import IO

from launch.cluster.hostfile import Host
from launch.cluster.ssh import UNREACHABLE, Ssh
from launch.supervision.messages import print_safely
from launch.supervision.outcome import OUTCOME_LINE, Outcome

FANOUT = 1024  # hosts that pdsh serves at a time: all of them, since the command runs until the end of the run
# The kernel kills our child processes when we die; the hosts then see the end of their standard input.
DIE_WITH_PARENT = ("setpriv", "--pdeathsig", "KILL")
PDSH_FAILURE = re.compile(r"pdsh@[^:]*: (?P<host>\S+): .*exited with exit code (?P<code>\d+)")


class RemoteShell:
    """A shell command on every host, until the `with` block ends; its variable `node` is the host's number, from 0.

    Attributes:
        exit_codes: of the hosts that have ended, by name; 255 for a host that was lost.
        outcomes: that the hosts' supervisors have printed, by the host's name.
    """

    def __init__(self, hosts: Sequence[Host], command: str, launcher: str, ssh: Ssh) -> None:
        self.exit_codes: dict[str, int] = {}
        self.outcomes: dict[str, Outcome] = {}
        self._hosts = list(hosts)
        self._events: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
        self._processes = (self._start_pdsh if launcher == "pdsh" else self._start_ssh)(command, ssh)

    def __enter__(self) -> RemoteShell:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
            if process.stdin:
                process.stdin.close()

    def has_ended(self) -> bool:
        """Whether the command has ended on every host."""
        return len(self.exit_codes) == len(self._hosts)

    def wait_for_event(self, seconds: float) -> None:
        """Wait until a host ends, for so many seconds at most."""
        with suppress(queue.Empty):
            self.exit_codes.setdefault(*self._events.get(timeout=seconds))

    def wait(self, seconds: float) -> None:
        """Wait until all hosts have ended, for so many seconds at most."""
        deadline = time.monotonic() + seconds
        while not self.has_ended() and (left := deadline - time.monotonic()) > 0:
            self.wait_for_event(left)

    def _start_ssh(self, command: str, ssh: Ssh) -> list[subprocess.Popen[str]]:
        processes = []
        for node, host in enumerate(self._hosts):
            processes.append(_start([*DIE_WITH_PARENT, *ssh.command(host.name, f"node={node}; {command}")]))
            threading.Thread(target=self._read_ssh, args=(host, processes[-1]), daemon=True).start()
        return processes

    def _read_ssh(self, host: Host, process: subprocess.Popen[str]) -> None:
        with _output(process) as lines:
            for line in lines:
                self._handle_line(host.name, line)
        self._events.put((host.name, process.wait() if process.wait() >= 0 else UNREACHABLE))

    def _start_pdsh(self, command: str, ssh: Ssh) -> list[subprocess.Popen[str]]:
        # All hosts share one argument, limited to 128 KiB by the kernel, so the common part stands in it only once.
        cases = "".join(f" {host.address}) node={node};;" for node, host in enumerate(self._hosts))
        pdsh = ["pdsh", "-S", "-R", "ssh", "-f", str(FANOUT), "-w", ",".join(host.name for host in self._hosts)]
        environment = {**os.environ, "PDSH_SSH_ARGS_APPEND": shlex.join(ssh.options())}
        script = f"case %h in{cases} esac; {command.replace('%', '%%')}"
        process = _start([*DIE_WITH_PARENT, *pdsh, script], environment)
        threading.Thread(target=self._read_pdsh, args=(process,), daemon=True).start()
        return [process]

    def _read_pdsh(self, process: subprocess.Popen[str]) -> None:
        names = {host.address: host.name for host in self._hosts}
        failed = set()
        with _output(process) as lines:
            for line in lines:
                if match := PDSH_FAILURE.match(line):
                    name = names.get(match["host"], match["host"])
                    failed.add(name)
                    self._events.put((name, int(match["code"])))
                else:
                    address, _, text = line.partition(": ")
                    self._handle_line(names.get(address, address), text)
        code = 0 if process.wait() >= 0 else UNREACHABLE
        for host in self._hosts:
            if host.name not in failed:  # pdsh reports only failures
                self._events.put((host.name, code))

    def _handle_line(self, name: str, line: str) -> None:
        """Keep the outcome of a host's supervisor; print any other line."""
        prefix, _, text = line.partition(" ")
        if prefix == OUTCOME_LINE:
            with suppress(ValueError, KeyError):
                fields = json.loads(text)
                self.outcomes[name] = Outcome(fields["exit_code"], fields["cause"], fields["reason"])
                return
        print_safely(f"{name}: {line}", sys.stdout, end="")


def _start(command: list[str], environment: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # the controller handles a terminal's signals and requests the hosts' stop
    )


def _output(process: subprocess.Popen[str]) -> IO[str]:
    assert process.stdout is not None
    return process.stdout
