"""``--nproc N``: the run in N processes of this machine, started by torchrun's own launcher."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable
from types import FrameType

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from gradacc.demo.ranks import check_gpus
from gradacc.demo.settings import DemoError, Settings


def launch(settings: Settings, conduct: Callable[[Settings], int]) -> int:
    """``conduct(settings)`` in ``settings.nproc`` processes; returns what rank 0 returned.

    The processes are told who they are as those of ``torchrun --standalone --nproc-per-node N`` are. Ctrl-C is passed on
    to them: it is rank 0 that decides.

    Raises:
        DemoError: this process is a rank itself, or there are fewer GPUs than processes.
    """
    if "WORLD_SIZE" in os.environ:
        raise DemoError("--nproc: torchrun has started this process already; leave --nproc out")
    check_gpus(settings.nproc)
    pressed: list[int] = []

    def pass_on(signum: int, frame: FrameType | None) -> None:
        pressed.append(signum)
        for process in multiprocessing.active_children():
            if process.pid is not None:
                os.kill(process.pid, signum)

    previous = signal.signal(signal.SIGINT, pass_on)
    try:
        with tempfile.TemporaryDirectory() as logs:
            config = LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=settings.nproc,
                run_id=uuid.uuid4().hex,
                rdzv_backend="c10d",
                rdzv_endpoint="localhost:0",
                max_restarts=0,
                logs_specs=DefaultLogsSpecs(log_dir=logs),
                signals_to_handle="SIGTERM,SIGHUP,SIGQUIT",  # not SIGINT, which is passed on
            )
            codes: dict[int, int] = elastic_launch(config, _conducted)(conduct, settings)
            return codes[0]
    except ChildFailedError as error:
        if pressed:
            return 128 + signal.SIGINT
        rank, failure = error.get_first_failure()
        print(f"gradacc demo: error: rank {rank} ended with exit code {failure.exitcode}, see above", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGINT, previous)


def _conducted(conduct: Callable[[Settings], int], settings: Settings) -> int:
    """In a started process, which ends with the one that started it: torch's would wait for it forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()
    return conduct(settings)
