"""Hosts as network namespaces on one machine: each has an address, a name and a cable to one switch.

The switch is a bridge in a namespace of its own, so nothing of it can be seen from outside, and all networks
may use the same addresses. Needs root and iproute2 (`why_not` says what is missing). Everything is removed at
the end; what a killed process has left, the next one removes.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import NamedTuple

from tests.fakes import DEADLINE_S, wait_until

PREFIX = "trackagent"
INTERFACE = "eth0"
NAMESPACES = Path("/run/netns")
_ETC = Path("/etc/netns")
_OURS = re.compile(rf"{PREFIX}-([0-9]+)-[0-9]+-[a-z0-9-]+")
_NUMBERS = count(1)
_CLONE_NEWNET = 0x40000000
_SIOCETHTOOL = 0x8946
# What hosts send are whole packets with checksums then, also where a process reads them on their way: without
# that, both are left to a device which veth does not have.
_ETHTOOL_OFFLOADS = (
    0x17,
    0x1F,
    0x24,
)  # SET of: tx checksums, tcp segmentation, generic segmentation


class NoHosts(Exception):
    """Why there can be no hosts here."""


def why_not() -> str:
    """What is missing here, or "". What kernel and container allow is tried, not guessed."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if missing := [name for name in ("ip", "unshare") if shutil.which(name) is None]:
        return f"{' and '.join(missing)} missing: install iproute2 and util-linux"
    try:
        with Network(["a"]):
            return ""
    except NoHosts as error:
        return str(error)


class Host(NamedTuple):
    """One of them. To other processes on this machine it is a namespace."""

    name: str
    address: str
    namespace: str

    def command(self, arguments: Sequence[str]) -> list[str]:
        """What runs the command there; it keeps its process id over that."""
        name_it = 'echo "$0" >/proc/sys/kernel/hostname && exec "$@"'
        named = ["unshare", "--uts", "sh", "-c", name_it, self.name]
        return ["ip", "netns", "exec", self.namespace, *named, *arguments]


class Network:
    """To be used with `with`. names: of the hosts, in the order of their addresses."""

    def __init__(self, names: Sequence[str]) -> None:
        mark = f"{PREFIX}-{os.getpid()}-{next(_NUMBERS)}"
        self._switch = f"{mark}-switch"
        self._cables: dict[str, subprocess.Popen[bytes]] = {}
        self.hosts = [
            Host(name, f"10.77.0.{number}", f"{mark}-{name}")
            for number, name in enumerate(names, 1)
        ]

    def __enter__(self) -> Network:
        _remove_what_the_dead_left()
        try:
            self._make()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _make(self) -> None:
        _ip("netns", "add", self._switch)
        self._in_switch("link", "add", "bridge", "type", "bridge")
        self._in_switch("link", "set", "bridge", "up")
        for host in self.hosts:
            _ip("netns", "add", host.namespace)
            port = self._port(host)
            there = ("peer", "name", INTERFACE, "netns", host.namespace)
            self._in_switch("link", "add", port, "type", "veth", *there)
            for interface in ("lo", INTERFACE):
                _ip("-n", host.namespace, "link", "set", interface, "up")
            _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", INTERFACE)
            _ip("-n", host.namespace, "route", "add", "default", "dev", INTERFACE)
            self._in_switch("link", "set", port, "master", "bridge", "up")
            with _inside(host.namespace):
                _no_offloads(INTERFACE)
            self._name(host)

    def _name(self, host: Host) -> None:
        """Its /etc/hosts, as `ip netns exec` finds it: all know each other, and nobody asks a name server."""
        folder = _ETC / host.namespace
        folder.mkdir(parents=True)
        lines = ["127.0.0.1 localhost", *(f"{one.address} {one.name}" for one in self.hosts)]
        (folder / "hosts").write_text("".join(f"{line}\n" for line in lines))
        (folder / "resolv.conf").write_text("")

    def run(
        self, host: Host, arguments: Sequence[str], env: Mapping[str, str], output: Path
    ) -> subprocess.Popen[bytes]:
        """Starts a command there, its output to a file."""
        with output.open("ab") as file:
            return subprocess.Popen(
                host.command(arguments),
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    # --- faults

    def partition(self, host: Host) -> None:
        """Nothing goes to this host or comes from it any more, and nobody is told so."""
        self._in_switch("link", "set", self._port(host), "nomaster")

    def rejoin(self, host: Host) -> None:
        """Ends what `partition` and `disturb` did."""
        if (cable := self._cables.pop(host.name, None)) is not None:
            cable.kill()
            cable.wait(DEADLINE_S)
            self._in_switch("link", "delete", f"{self._port(host)}r")
        self._in_switch("link", "set", self._port(host), "master", "bridge", "up")

    def disturb(self, host: Host, *, delay_s: float, jitter_s: float, loss: float) -> None:
        """Each packet to and from this host is late by delay_s and at most jitter_s, so that some overtake
        others, and is lost with the probability `loss`.

        A process of ours does it (cable.py), since kernels that are made small have no netem."""
        port = self._port(host)
        near, far = f"{port}r", f"{port}b"
        self._in_switch("link", "add", near, "type", "veth", "peer", "name", far)
        self._in_switch("link", "set", near, "up")
        self._in_switch("link", "set", port, "nomaster")
        ready_in, ready_out = os.pipe()
        program = [sys.executable, "-m", "tests.multihost.cable", port, near]
        numbers = [str(delay_s), str(jitter_s), str(loss), str(ready_out)]
        self._cables[host.name] = subprocess.Popen(
            ["ip", "netns", "exec", self._switch, *program, *numbers],
            stdin=subprocess.DEVNULL,
            pass_fds=[ready_out],
            cwd=Path(__file__).parents[2],
        )
        os.close(ready_out)
        with open(ready_in, "rb") as ready:
            assert ready.read() == b"ready", "the cable has ended"
        self._in_switch("link", "set", far, "master", "bridge", "up")

    def kill(self, host: Host) -> None:
        """As when its power is cut: nothing leaves it any more, and its processes are gone."""
        self.partition(host)
        _kill(host.namespace)

    # --- the end

    def close(self) -> None:
        for cable in self._cables.values():
            cable.kill()
            cable.wait(DEADLINE_S)
        self._cables.clear()
        _remove([self._switch, *(host.namespace for host in self.hosts)])

    def _port(self, host: Host) -> str:
        return f"p{self.hosts.index(host)}"

    def _in_switch(self, *arguments: str) -> None:
        _ip("-n", self._switch, *arguments)


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NoHosts(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def _remove(namespaces: Sequence[str]) -> None:
    for namespace in namespaces:
        if (NAMESPACES / namespace).exists():
            _kill(namespace)
            _ip("netns", "delete", namespace)
        shutil.rmtree(_ETC / namespace, ignore_errors=True)
    with contextlib.suppress(OSError):  # others may have theirs there
        _ETC.rmdir()


def _kill(namespace: str) -> None:
    def are_gone() -> bool:
        left = [int(line) for line in _ip("netns", "pids", namespace).split()]
        for process in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        # Who is killed and not yet waited for has no namespaces any more.
        return not left

    wait_until(are_gone, f"the processes in {namespace} have ended")


def _remove_what_the_dead_left() -> None:
    names = os.listdir(NAMESPACES) if NAMESPACES.exists() else []
    marks = [found for name in names if (found := _OURS.fullmatch(name))]
    _remove([found[0] for found in marks if not Path("/proc", found[1]).exists()])


@contextlib.contextmanager
def _inside(namespace: str) -> Iterator[None]:
    """This thread is in a network namespace."""
    with open("/proc/thread-self/ns/net") as before, open(NAMESPACES / namespace) as there:
        _set_namespace(there.fileno())
        try:
            yield
        finally:
            _set_namespace(before.fileno())


def _set_namespace(descriptor: int) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(descriptor, _CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise NoHosts(f"cannot enter a network namespace: {os.strerror(number)}")


def _no_offloads(interface: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for command in _ETHTOOL_OFFLOADS:
            value = ctypes.create_string_buffer(struct.pack("II", command, 0))
            request = struct.pack("16sP", interface.encode(), ctypes.addressof(value))
            fcntl.ioctl(any_socket, _SIOCETHTOOL, request)
