"""The gradient of many ranks against that of one large batch: ranks that are threads, with real sums between them.

Torch's process group of threads adds what all ranks have sent; tensors are tiny, so that a thousand ranks fit. Everything
else is as between processes: agreement at first use, records, packing, errors.
"""

from __future__ import annotations

import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed import multi_threaded_pg

import gradacc

WORLDS = (64, 256, 1024)
STACK = 1 << 20
"""Bytes of a thread's."""
SWITCH = 0.2
"""Seconds that a thread keeps the interpreter where others want it: with Python's own 0.005, hundreds that wake up at once
take three times as long."""
LIMIT = 400.0
"""Seconds after which ranks that are not done count as hanging."""
ROWS, WIDTH = 5, 3


class PlannedError(Exception):
    """The one that a rank raises."""


def on_threads(world: int, rank_fn: Callable[[int, dist.ProcessGroup], Any]) -> list[Any]:
    """What ``rank_fn(rank, group)`` returned or raised in each of ``world`` threads; ``TimeoutError`` where it did neither."""
    store = torch._C._distributed_c10d.HashStore()
    found: list[Any] = [TimeoutError("does not come back")] * world
    over = threading.Event()

    def run(rank: int) -> None:
        try:
            dist.init_process_group("threaded", rank=rank, world_size=world, store=store)
            assert dist.group.WORLD is not None
            found[rank] = rank_fn(rank, dist.group.WORLD)
        except Exception as error:
            found[rank] = error
        finally:
            # Whoever comes back later is in another world.
            if not over.is_set() and dist.is_initialized():
                dist.destroy_process_group()

    with _threaded():
        threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(world)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + LIMIT
        for thread in threads:
            thread.join(max(deadline - time.monotonic(), 0.0))
        over.set()
    return found


@contextmanager
def _threaded() -> Iterator[None]:
    """Process groups are of threads, which are small, and do not interrupt each other often."""
    stack, switch = threading.stack_size(STACK), sys.getswitchinterval()
    sys.setswitchinterval(SWITCH)
    isolate: Callable[[bool], None] = torch._C._distributed_c10d._set_thread_isolation_mode  # type: ignore[attr-defined]
    isolate(True)
    multi_threaded_pg._install_threaded_pg()  # type: ignore[no-untyped-call]  # torch's
    try:
        yield
    finally:
        multi_threaded_pg._uninstall_threaded_pg()  # type: ignore[no-untyped-call]  # torch's
        isolate(False)
        threading.stack_size(stack)
        sys.setswitchinterval(switch)


def share(rank: int) -> Tensor:
    """A rank's examples: none to four of them, each other ones."""
    count = rank * 7 % ROWS
    return (torch.arange(count * WIDTH, dtype=torch.float64).view(count, WIDTH) + rank).sin()


def parameters() -> dict[str, Tensor]:
    """Of one hidden layer."""
    return {
        "w": torch.linspace(-1, 1, WIDTH * 2, dtype=torch.float64).view(WIDTH, 2),
        "b": torch.full((2,), 0.1, dtype=torch.float64),
    }


def loss(params: dict[str, Tensor], batch: Tensor) -> gradacc.Mean:
    """Weighted by the number of examples."""
    return gradacc.Mean((batch @ params["w"] + params["b"]).tanh().square().sum(), len(batch))


def measure(*, quick: bool) -> dict[str, Any]:
    """At every number of ranks."""
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {"ranks": {str(world): at(world) for world in (WORLDS[:1] if quick else WORLDS)}}


def at(world: int) -> dict[str, Any]:
    """One call of all ranks, one in which a rank fails, and one more; what is wrong raises an `AssertionError`.

    The second call is of another rank's examples, so that a result that was kept from the first would be found out.
    """
    print(f"exactness: {world} ranks", file=sys.stderr)
    failing, begin = world * 2 // 3, time.perf_counter()
    answers = on_threads(world, lambda rank, group: _calls(rank, group, failing))
    elapsed = time.perf_counter() - begin
    for rank, answer in enumerate(answers):
        if isinstance(answer, BaseException):
            raise AssertionError(f"rank {rank} of {world}: {answer!r}") from answer
    wrong = [_relative(_expected(world, turn), [answer[turn] for answer in answers]) for turn in (0, 1)]
    alike = all(
        torch.equal(one, other)
        for turn in (0, 1)
        for answer in answers
        for one, other in zip(answers[0][turn], answer[turn], strict=True)
    )
    named = f"because the call raised on rank {failing} of"
    told = sum(isinstance(answer[2], RuntimeError) and named in str(answer[2]) for answer in answers)
    return {
        "error": max(wrong),
        "alike": alike,
        "empty": sum(not len(share(rank)) for rank in range(world)),
        "examples": sum(len(share(rank)) for rank in range(world)),
        "told": told + isinstance(answers[failing][2], PlannedError),
        "seconds": round(elapsed, 1),
    }


def _calls(rank: int, group: dist.ProcessGroup, failing: int) -> list[Any]:
    fails = [False]

    def may_fail(params: dict[str, Tensor], batch: Tensor) -> gradacc.Mean:
        if fails[0]:
            raise PlannedError(f"planned, on rank {rank}")
        return loss(params, batch)

    grad_fn = gradacc.accumulate_and_value(may_fail, steps=2, sync=gradacc.all_reduce(group))
    answers: list[Any] = [_leaves(grad_fn(parameters(), share(rank)))]
    fails[0] = rank == failing
    # A rank without examples calls no loss, so the one that fails has some.
    examples = share(1) if fails[0] else share(rank)
    try:
        grad_fn(parameters(), examples)
        problem: Exception | None = None
    except (PlannedError, RuntimeError) as error:
        problem = error
    fails[0] = False
    answers.append(_leaves(grad_fn(parameters(), share(rank + 1))))
    return [*answers, problem]


def _leaves(result: Any) -> list[Tensor]:
    grads, value = result
    return [grads["w"], grads["b"], value.value if isinstance(value, gradacc.Mean) else value]


def _expected(world: int, turn: int) -> list[Tensor]:
    """One large batch, by autograd alone."""
    params = {name: leaf.requires_grad_() for name, leaf in parameters().items()}
    batch = torch.cat([share(rank + turn) for rank in range(world)])
    mean = loss(params, batch)
    value = mean.total / mean.weight
    return [*torch.autograd.grad(value, [params["w"], params["b"]]), value.detach()]


def _relative(expected: list[Tensor], answers: list[list[Tensor]]) -> float:
    """The largest relative error of an element of any rank."""
    return max(
        ((found - right) / right).abs().max().item()
        for answer in answers
        for found, right in zip(answer, expected, strict=True)
    )
