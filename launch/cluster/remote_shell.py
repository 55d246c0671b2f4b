"""One long command on many hosts, by one pdsh or an ssh for each: their lines, and how each ended."""

from __future__ import annotations

import json
import os
import queue
import re
import shlex
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import IO

from launch.cluster.hostfile import Host
from launch.cluster.ssh import UNREACHABLE, Ssh
from launch.supervision.outcome import OUTCOME_LINE, Outcome

FAN_OUT = 1024  # hosts that pdsh is at, at a time: all of them, they run till the end
# The kernel ends what we started with us; the hosts then find their standard input at its end.
WITH_US = ("setpriv", "--pdeathsig", "KILL")
ENDED = re.compile(r"pdsh@[^:]*: (?P<host>\S+): .*exited with exit code (?P<code>\d+)")


class RemoteShell:
    """A shell command on every host, running until the block ends; its variable `node` is the host's number, from 0.

    Attributes:
        codes: exit codes of hosts that have ended, by the host's name; 255 where it was lost.
        ends: what their supervisors said of it, where they could.
    """

    def __init__(self, hosts: Sequence[Host], command: str, launcher: str, how: Ssh) -> None:
        self.codes: dict[str, int] = {}
        self.ends: dict[str, Outcome] = {}
        self._hosts = list(hosts)
        self._news: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
        start = self._start_pdsh if launcher == "pdsh" else self._start_ssh
        self._processes = start(command, how)

    def __enter__(self) -> RemoteShell:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
            if process.stdin:
                process.stdin.close()

    def is_over(self) -> bool:
        """Whether every host has ended."""
        return len(self.codes) == len(self._hosts)

    def wait_for_news(self, seconds: float) -> None:
        """Take in how a host ended, if one does within so many seconds."""
        try:
            host, code = self._news.get(timeout=seconds)
        except queue.Empty:
            return
        self.codes.setdefault(host, code)

    def wait(self, seconds: float) -> None:
        """Let the others end too, for so many seconds at most."""
        deadline = time.monotonic() + seconds
        while not self.is_over() and (left := deadline - time.monotonic()) > 0:
            self.wait_for_news(left)

    def _start_ssh(self, command: str, how: Ssh) -> list[subprocess.Popen[str]]:
        processes = []
        for node, host in enumerate(self._hosts):
            process = _popen([*WITH_US, *how.command(host.name, f"node={node}; {command}")])
            processes.append(process)
            self._thread(self._heed_ssh, host, process)
        return processes

    def _heed_ssh(self, host: Host, process: subprocess.Popen[str]) -> None:
        with _lines(process.stdout) as lines:
            for line in lines:
                self._hear(host.name, line)
        self._news.put((host.name, process.wait() if process.wait() >= 0 else UNREACHABLE))

    def _start_pdsh(self, command: str, how: Ssh) -> list[subprocess.Popen[str]]:
        # All hosts share one argument, of which the kernel takes 128 KiB: what they have in common stands there once.
        cases = "".join(f" {host.address}) node={node};;" for node, host in enumerate(self._hosts))
        words = ["pdsh", "-S", "-R", "ssh", "-f", str(FAN_OUT), "-w", ",".join(host.name for host in self._hosts)]
        environment = {**os.environ, "PDSH_SSH_ARGS_APPEND": shlex.join(how.options())}
        process = _popen([*WITH_US, *words, f"case %h in{cases} esac; {command.replace('%', '%%')}"], environment)
        self._thread(self._heed_pdsh, process)
        return [process]

    def _heed_pdsh(self, process: subprocess.Popen[str]) -> None:
        by_address = {host.address: host.name for host in self._hosts}
        told = set()
        with _lines(process.stdout) as lines:
            for line in lines:
                if found := ENDED.match(line):
                    name = by_address.get(found["host"], found["host"])
                    told.add(name)
                    self._news.put((name, int(found["code"])))
                else:
                    address, _, text = line.partition(": ")
                    self._hear(by_address.get(address, address), text)
        code = 0 if process.wait() >= 0 else UNREACHABLE
        for host in self._hosts:
            if host.name not in told:  # pdsh tells only of those that failed
                self._news.put((host.name, code))

    def _hear(self, name: str, line: str) -> None:
        """Pass a line on, or keep what the supervisor of a host says last."""
        word, _, text = line.partition(" ")
        if word == OUTCOME_LINE:
            with suppress(ValueError, KeyError):
                end = json.loads(text)
                self.ends[name] = Outcome(end["exit_code"], end["cause"], end["reason"])
                return
        with suppress(OSError):  # of a terminal that was closed; how the host ends is still to be heard
            print(f"{name}: {line}", end="", flush=True)

    @staticmethod
    def _thread(target: object, *arguments: object) -> None:
        threading.Thread(target=target, args=arguments, daemon=True).start()  # type: ignore[arg-type]


def _popen(words: list[str], environment: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        words,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # a terminal's signals are for us, who ask the hosts to stop
    )


def _lines(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream
