"""Networks for two ranks: this machine's loopback, or two hosts of network namespaces with a slow cable between them."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

WORLD = 2
INTERFACE = "cable"
BURST, QUEUE = "256kb", "50ms"
"""Of the token bucket: what may leave at once (more than the rate times a kernel tick), and how long a packet may wait."""
RATE = 400
"""Mbit/s of the slow link."""
LIMIT = 3600.0
"""Seconds after which a pair of ranks is ended."""
ENDING = 40.0
"""Seconds that torchrun gets to end its ranks when asked."""


class UnavailableError(Exception):
    """This machine does not let us make such a network; the text says why."""


class Host(NamedTuple):
    """Where ranks are started."""

    prefix: tuple[str, ...]
    """What comes before a command that is to run there."""
    interface: str
    address: str


@contextmanager
def loopback() -> Iterator[list[Host]]:
    """One host, both ranks on it."""
    yield [Host((), "lo", "127.0.0.1")]


@contextmanager
def two_hosts(rate: int) -> Iterator[list[Host]]:
    """Two hosts, joined by a veth pair whose both ends send `rate` Mbit/s through `tc … tbf`.

    Raises `UnavailableError` where that is impossible (not Linux, not root, no iproute2). The namespaces, and with them the
    cable, are gone afterwards, whatever happens in between.
    """
    if not shutil.which("ip") or not shutil.which("tc"):
        raise UnavailableError("there is no `ip` or no `tc` (Debian: apt-get install iproute2)")
    names = [f"gradacc-{os.getpid()}-{end}" for end in range(WORLD)]
    hosts = [Host(("ip", "netns", "exec", name), INTERFACE, f"10.213.0.{end + 1}") for end, name in enumerate(names)]
    try:
        for name in names:
            _do("ip", "netns", "add", name)
        here, there = names
        _do("ip", "link", "add", INTERFACE, "netns", here, "type", "veth", "peer", "name", INTERFACE, "netns", there)
        for name, host in zip(names, hosts, strict=True):
            _do("ip", "-n", name, "address", "add", f"{host.address}/24", "dev", INTERFACE)
            for interface in ("lo", INTERFACE):
                _do("ip", "-n", name, "link", "set", interface, "up")
            bucket = ("rate", f"{rate}mbit", "burst", BURST, "latency", QUEUE)
            _do("tc", "-n", name, "qdisc", "add", "dev", INTERFACE, "root", "tbf", *bucket)
            _do(*host.prefix, "true")
        yield hosts
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


class Link(NamedTuple):
    """A network that two ranks can have between them."""

    title: str
    open: Callable[[], AbstractContextManager[list[Host]]]


LINKS = {
    "loopback": Link("one host, loopback", loopback),
    "slow": Link(f"two hosts, {RATE} Mbit/s", lambda: two_hosts(RATE)),
}


def _do(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UnavailableError(f"`{' '.join(command)}` failed: {done.stderr.strip() or done.stdout.strip()}")


def sent(interface: str) -> int:
    """Bytes that this network namespace has sent through `interface`, as the kernel counts them, headers included."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, columns = line.partition(":")
        if name.strip() == interface:
            return int(columns.split()[8])
    raise ValueError(f"no interface {interface}")


def found(
    hosts: Sequence[Host], module: str, options: Mapping[str, object], environment: Mapping[str, str] | None = None
) -> Any:
    """What `WORLD` ranks of ``python -m module --name value … --result FILE`` wrote there, as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        launch(hosts, module, [*words, "--result", str(result)], timeout=LIMIT, more=environment)
        return json.loads(result.read_text())


def launch(
    hosts: Sequence[Host],
    module: str,
    arguments: Sequence[str],
    *,
    timeout: float,
    more: Mapping[str, str] | None = None,
) -> None:
    """`python -m module arguments` in `WORLD` ranks spread over `hosts`, one torchrun a host; raises where one fails.

    ``more`` goes into their environment.
    """
    port = _free_port() if len(hosts) == 1 else 29500
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, f"{end}.log") for end in range(len(hosts))]
        running: list[subprocess.Popen[bytes]] = []
        try:
            for end, (host, log) in enumerate(zip(hosts, logs, strict=True)):
                torchrun = [*host.prefix, sys.executable, "-m", "torch.distributed.run", "--nnodes", str(len(hosts))]
                torchrun += ["--node-rank", str(end), "--nproc-per-node", str(WORLD // len(hosts))]
                torchrun += ["--master-addr", hosts[0].address, "--master-port", str(port)]
                torchrun += ["--local-addr", host.address, "-m", module, *arguments]
                environment = {
                    **os.environ,
                    "GLOO_SOCKET_IFNAME": host.interface,
                    "OMP_NUM_THREADS": "1",
                    **(more or {}),
                }
                with log.open("wb") as output:
                    started = subprocess.Popen(
                        torchrun, env=environment, stdout=output, stderr=output, cwd=Path(__file__).parents[1]
                    )
                running.append(started)
            _await(running, time.monotonic() + timeout)
        except RuntimeError as error:
            said = "\n".join(log.read_text(errors="replace") for log in logs)
            raise RuntimeError(f"{module} {' '.join(arguments)}: {error}\n{said}") from None
        finally:
            _end(running)


def _await(running: Sequence[subprocess.Popen[bytes]], deadline: float) -> None:
    while any(process.poll() is None for process in running):
        failed = [process.returncode for process in running if process.poll()]
        if failed or time.monotonic() > deadline:
            raise RuntimeError(f"ended with {failed[0]}" if failed else "took too long")
        time.sleep(0.1)
    if any(process.returncode for process in running):
        raise RuntimeError(f"ended with {[process.returncode for process in running]}")


def _end(running: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in running:
        process.terminate()
    for process in running:
        with suppress(subprocess.TimeoutExpired):
            process.wait(ENDING)
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
