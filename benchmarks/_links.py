"""Hosts on links whose rate and delay are set while ranks run: namespaces, joined by a relay in this process's care.

Each host is a network namespace with one TUN device. A relay process reads what a host sends, and hands it to the host that it
is addressed to when a link would have: packets of a sender leave one after the other at its ``rate``, and arrive ``delay``
seconds later. So the link is known, and a model of it can be refuted. (`tc … netem` would do, but some kernels have none.)
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks._network import UnavailableError

INTERFACE, MTU = "cable", 32_000
"""Few packets, so that the relay, which is Python, is not what is measured."""
_TCP = {
    "tcp_rmem": "4096 8388608 16777216",
    "tcp_wmem": "4096 8388608 16777216",
    "tcp_slow_start_after_idle": "0",
}
"""Windows that do not have to open first: of a model of links, TCP's own clock is no part."""
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI, _CLONE_NEWNET, _PR_SET_PDEATHSIG = 0x400454CA, 0x0001, 0x1000, 0x40000000, 1


class Link(NamedTuple):
    """What every host's link does."""

    rate: float
    """Mbit/s that a host can send, and another can receive from it; 0: no limit."""
    delay: float
    """Seconds from the end of a packet to its arrival."""


class Hosts(NamedTuple):
    """Namespaces, in order of their addresses, and where the relay listens."""

    names: tuple[str, ...]
    control: str

    def enter(self, index: int) -> None:
        """Put this process into a host."""
        with Path("/var/run/netns", self.names[index]).open() as namespace:
            if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
        os.environ["GLOO_SOCKET_IFNAME"] = INTERFACE

    def set_link(self, link: Link) -> None:
        """Of all hosts, from the next packet on; a unix socket is reached from every namespace."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as relay:
            relay.settimeout(10)
            relay.connect(self.control)
            relay.sendall(f"{link.rate} {link.delay}".encode())
            if relay.recv(2) != b"ok":
                raise RuntimeError("the relay does not answer")


def address(index: int) -> str:
    """Of a host."""
    return f"10.214.0.{index + 1}"


@contextmanager
def hosts(world: int) -> Iterator[Hosts]:
    """So many hosts. Raises `UnavailableError` where that is impossible; they are gone afterwards, come what may."""
    if not shutil.which("ip") or not Path("/dev/net/tun").exists():
        raise UnavailableError("there is no `ip` (Debian: apt-get install iproute2), or no /dev/net/tun")
    names = tuple(f"gradacc-{os.getpid()}-{index}" for index in range(world))
    relay = None
    with tempfile.TemporaryDirectory() as folder:
        made = Hosts(names, str(Path(folder, "control")))
        try:
            for name in names:
                _do("ip", "netns", "add", name)
            with Path(folder, "log").open("wb") as log:
                command = [sys.executable, "-m", "benchmarks._links", made.control, *names]
                relay = subprocess.Popen(command, cwd=Path(__file__).parents[1], stderr=log)
            _await(made, relay, Path(folder, "log"))
            yield made
        finally:
            if relay is not None:
                relay.kill()
                relay.wait()
            for name in names:
                subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def _await(made: Hosts, relay: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 20
    while not Path(made.control).exists():
        if relay.poll() is not None or time.monotonic() > deadline:
            said = log.read_text(errors="replace").strip().splitlines()
            raise UnavailableError(f"no links: {said[-1] if said else 'the relay does not start'}")
        time.sleep(0.02)


def _do(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UnavailableError(f"`{' '.join(command)}` failed: {done.stderr.strip() or done.stdout.strip()}")


def _device(index: int, namespace: str) -> int:
    """A TUN device, made here and moved to a host; this end of it."""
    name = f"ga{os.getpid()}-{index}"
    end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(end, _TUNSETIFF, struct.pack("16sH", name.encode(), _IFF_TUN | _IFF_NO_PI))
    _do("ip", "link", "set", name, "netns", namespace, "name", INTERFACE)
    _do("ip", "-n", namespace, "address", "add", f"{address(index)}/24", "dev", INTERFACE)
    _do("ip", "-n", namespace, "link", "set", INTERFACE, "mtu", str(MTU), "txqueuelen", "10000", "up")
    _do("ip", "-n", namespace, "link", "set", "lo", "up")
    for name, value in _TCP.items():
        _do("ip", "netns", "exec", namespace, "sh", "-c", f"echo {value} > /proc/sys/net/ipv4/{name}")
    return end


class _Relay:
    """Packets under way."""

    def __init__(self, ends: Sequence[int]) -> None:
        self.ends, self.link = ends, Link(0.0, 0.0)
        self.free = [0.0] * len(ends)
        """When each sender's link has nothing more to send."""
        self.under_way: list[tuple[float, int, int, bytes]] = []
        self._count = 0

    def read(self, sender: int) -> None:
        """Everything that a host has sent."""
        for _ in range(64):
            try:
                packet = os.read(self.ends[sender], MTU + 100)
            except BlockingIOError:
                return
            if packet[0] >> 4 == 4 and packet[16:19] == b"\x0a\xd6\x00" and 0 < packet[19] <= len(self.ends):
                begins = max(time.perf_counter(), self.free[sender])
                self.free[sender] = begins + (len(packet) * 8e-6 / self.link.rate if self.link.rate else 0.0)
                self._count += 1
                arrival = self.free[sender] + self.link.delay
                heapq.heappush(self.under_way, (arrival, self._count, packet[19] - 1, packet))

    def deliver(self) -> float:
        """What has arrived; how long until more does."""
        while self.under_way:
            left = self.under_way[0][0] - time.perf_counter()
            if left > 0:
                return left
            os.write(self.ends[self.under_way[0][2]], heapq.heappop(self.under_way)[3])
        return 1.0


def end_with_parent() -> None:
    """This process is killed when the one that started it ends, however that is."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _relay(control: str, names: Sequence[str]) -> None:
    end_with_parent()
    relay = _Relay([_device(index, name) for index, name in enumerate(names)])
    senders = {end: index for index, end in enumerate(relay.ends)}
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(control)
        listener.listen()
        sources: list[Any] = [*relay.ends, listener]
        while True:
            for source in select.select(sources, (), (), relay.deliver())[0]:
                if source in senders:
                    relay.read(senders[source])
                else:
                    with listener.accept()[0] as caller:
                        rate, delay = caller.recv(100).split()
                        relay.link = Link(float(rate), float(delay))
                        caller.sendall(b"ok")


if __name__ == "__main__":
    _relay(sys.argv[1], sys.argv[2:])
