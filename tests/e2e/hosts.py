"""Hosts on separate network stacks: one network namespace each, with an address and a cable to a common switch."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

import pytest

_SUBNET = "192.0.2"  # RFC 5737: addresses for documentation, which no network uses


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


class Network:
    """A switch, itself a namespace, and the hosts that are plugged into it; nothing of it touches the machine's own."""

    def __init__(self, names: list[str]) -> None:
        self._prefix = f"fgl{os.getpid()}"
        self.addresses = {name: f"{_SUBNET}.{10 + index}" for index, name in enumerate(names)}

    def namespace(self, host: str) -> str:
        return f"{self._prefix}-{host}"

    def build(self) -> None:
        switch = self.namespace("switch")
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "switch", "type", "bridge")
        _ip("-n", switch, "link", "set", "switch", "up")
        lines = ["127.0.0.1 localhost", *(f"{address} {name}.example.org" for name, address in self.addresses.items())]
        for host, address in self.addresses.items():
            namespace = self.namespace(host)
            _ip("netns", "add", namespace)
            # `ip netns exec` shows a host this file as its /etc/hosts.
            folder = Path("/etc/netns") / namespace
            folder.mkdir(parents=True)
            (folder / "hosts").write_text("\n".join(lines) + "\n")
            _ip("-n", switch, "link", "add", host, "type", "veth", "peer", "name", "eth0", "netns", namespace)
            _ip("-n", switch, "link", "set", host, "master", "switch", "up")
            _ip("-n", namespace, "address", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", namespace, "link", "set", device, "up")

    def tear_down(self) -> None:
        for host in ("switch", *self.addresses):
            with contextlib.suppress(subprocess.CalledProcessError):
                for pid in _ip("netns", "pids", self.namespace(host)).split():  # Flower's parts begin own sessions
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
                _ip("netns", "delete", self.namespace(host))
            shutil.rmtree(Path("/etc/netns") / self.namespace(host), ignore_errors=True)

    def plug(self, host: str, state: str) -> None:
        """Pull a host's cable out of the switch (``down``), or put it back in (``up``)."""
        _ip("-n", self.namespace("switch"), "link", "set", host, state)

    def on(self, host: str, *command: object) -> list[str]:
        """Return the command line that runs ``command`` on a host."""
        return ["ip", "netns", "exec", self.namespace(host), *map(str, command)]


class Processes:
    """What a test started, with a log file each, to be stopped in reverse order."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._folder, self._environment = folder, dict(environment)
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self._logs: list[IO[bytes]] = []

    def start(self, name: str, command: list[str], **environment: str) -> subprocess.Popen[bytes]:
        self._logs.append(self.log_of(name).open("wb"))
        self.running[name] = subprocess.Popen(
            command, env=self._environment | environment, cwd=self._folder, stdin=subprocess.DEVNULL,
            stdout=self._logs[-1], stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        return self.running[name]

    def log_of(self, name: str) -> Path:
        return self._folder / f"{name}.log"

    def output(self) -> str:
        return "\n".join(f"== {name}\n{self.log_of(name).read_text('utf-8', 'replace')}" for name in self.running)

    def stop(self) -> None:
        for process in reversed(self.running.values()):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for process in self.running.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()
            process.wait()
        for log in self._logs:
            log.close()


@contextlib.contextmanager
def network(*names: str) -> Iterator[Network]:
    """Build hosts, or skip the test where that is not permitted."""
    hosts = Network(list(names))
    try:
        try:
            hosts.build()
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", None) or str(error)
            pytest.skip(f"network namespaces need root and iproute2: {reason.strip()}")
        yield hosts
    finally:
        hosts.tear_down()
