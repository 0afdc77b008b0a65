"""Very many ranks: threads of this process, with real collectives between them."""

import threading

import torch
import torch.distributed as dist
from torch.testing._internal.distributed import multi_threaded_pg


def on_threads(world, rank_fn):
    """What ``rank_fn(rank, group)`` returned on each of so many, or the exception that it raised."""
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    multi_threaded_pg._install_threaded_pg()
    store, found = dist.HashStore(), [None] * world

    def run(rank):
        dist.init_process_group("threaded", rank=rank, world_size=world, store=store)
        try:
            found[rank] = rank_fn(rank, dist.group.WORLD)
        except Exception as error:  # for the caller to look at, or raise
            found[rank] = error
        finally:
            dist.destroy_process_group()

    try:
        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(100)
        assert not any(thread.is_alive() for thread in threads), "a rank waits"
    finally:
        multi_threaded_pg._uninstall_threaded_pg()
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
    return found
