"""Real ranks for tests: a pool of processes that lives as long as the test run.

``pool.run(world, function, *args)`` calls ``function(group, *args)`` in ``world`` processes, with a gloo group of exactly
these, and returns what each returned. Functions and arguments are pickled, so functions are module-level ones.

On Linux one process forks them that has imported what all of them need, since importing it costs more than most tests.
"""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

SIZE = 4
TIMEOUT = 60.0


class Failed(Exception):
    """A rank raised; the text is its traceback."""


class Pool:
    """`SIZE` processes that wait for work."""

    def __init__(self) -> None:
        key = os.urandom(16)
        with Listener(("localhost", 0), authkey=key) as listener:
            environment = {**os.environ, "GRADACC_TEST_POOL": key.hex(), "OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-m", "tests.workers", str(listener.address[1])]
            self._process = subprocess.Popen(command, env=environment)
            accepted = [listener.accept() for _ in range(SIZE)]
            connections = {connection.recv(): connection for connection in accepted}
        self._connections: list[Connection] = [connections[rank] for rank in range(SIZE)]

    def run(self, world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What ``function(group, *args)`` returned on each of the first ``world`` ranks."""
        return self.run_each(world, function, [args] * world)

    def run_each(self, world: int, function: Callable[..., Any], args: list[tuple[Any, ...]]) -> list[Any]:
        """The same, with arguments of its own for each rank."""
        for rank in range(world):
            _send(self._connections[rank], (world, function, args[rank]))
        answers = []
        for rank in range(world):
            if not self._connections[rank].poll(2 * TIMEOUT):
                raise TimeoutError(f"rank {rank} of the pool does not answer")
            answers.append(_receive(self._connections[rank]))
        for rank, (fine, answer) in enumerate(answers):
            if not fine:
                raise Failed(f"rank {rank}:\n{answer}")
        return [answer for _, answer in answers]

    def close(self) -> None:
        """End the processes."""
        try:
            for connection in self._connections:
                _send(connection, None)
            self._process.wait(30)
        finally:
            self._process.kill()
            self._process.wait()


def _send(connection: Connection, value: Any) -> None:
    connection.send_bytes(pickle.dumps(value))  # `send` would put tensors into shared memory


def _receive(connection: Connection) -> Any:
    return pickle.loads(connection.recv_bytes())


def _start(port: int) -> None:
    import torch._dynamo
    import torch.distributed.tensor
    import torch.multiprocessing

    import tests.helpers  # noqa: F401  # all that every rank would import

    # On a Mac what has been forked may not use the system's libraries.
    method = "fork" if sys.platform == "linux" else "spawn"
    with socket.create_server(("localhost", 0)) as server:
        torch.multiprocessing.start_processes(_work, (port, server), nprocs=SIZE, start_method=method)


def _work(rank: int, port: int, server: socket.socket) -> None:
    import torch
    import torch.distributed as dist

    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", ".*read as [0-9]+ micro-batch", UserWarning)  # as in pyproject.toml
    torch.set_num_threads(1)
    name, number, *_ = server.getsockname()
    master = {"is_master": True, "master_listen_fd": server.detach()} if rank == 0 else {"is_master": False}
    store = dist.TCPStore(name, number, SIZE, **master)
    with Client(("localhost", port), authkey=bytes.fromhex(os.environ["GRADACC_TEST_POOL"])) as connection:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=SIZE, timeout=timedelta(seconds=TIMEOUT))
        groups = {world: dist.new_group(list(range(world))) for world in range(1, SIZE + 1)}
        connection.send(rank)
        while (task := _receive(connection)) is not None:
            world, function, args = task
            torch.manual_seed(0)
            try:
                answer = True, function(groups[world], *args)
            except Exception:  # whatever a test raises, here or there
                answer = False, traceback.format_exc()
            _send(connection, answer)
        dist.destroy_process_group()


if __name__ == "__main__":
    _start(int(sys.argv[1]))
