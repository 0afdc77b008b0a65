"""Sequences of calls in which ranks fail, skip and mix up calls: ``python -m tests.sync.fuzz 5000 [first seed]``.

A *program* says, for every rank, which calls it makes and what goes wrong in them; ranks that skip a call or make two in
another order are programs too, as the n-th call of one rank meets the n-th of the others, whatever it is. What must happen is
known without gradacc: where all ranks call the same function and nothing goes wrong, every one of them gets the gradient and
the value of the union, with the same bits; else every rank raises.
"""

from __future__ import annotations

import contextlib
import math
import random
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch

import gradacc
from gradacc import _sums
from gradacc._sync import wire
from gradacc._sync.sending import Sending
from tests.workers import Pool

WORLDS = (1, 2, 3, 4)

OURS = ("packing", "memory")
CALLS = (*OURS, "parameters", "iterator", "loss", "weight", "backward", "interrupt")
AUX = ("aux", "number")
"""What can go wrong before a rank has its result: in code of our own, in a call of a function, in what it returns as aux."""
AFTER = "after"
"""And when the others have theirs."""


class Mode(NamedTuple):
    """How the gradient is taken, on all ranks alike."""

    form: str
    """accumulate, accumulator"""
    returns: str
    """mean, sum, Mean"""
    dtype: torch.dtype
    aux: bool
    compress: torch.dtype | None
    overlap: bool
    way: str
    """summed, ordered, parts"""


class Call(NamedTuple):
    """One rank's call."""

    which: int
    """Of the two functions of a program."""
    sizes: tuple[int, ...]
    weight: float
    """Of each example, where the loss is a `Mean`."""
    seed: int
    fault: str | None


class Program(NamedTuple):
    """Of all ranks."""

    modes: tuple[Mode, Mode]
    calls: tuple[tuple[Call, ...], ...]
    """For each rank, as many as for every other one."""


class Own(Exception):
    """What goes wrong."""


def program(seed: int, world: int) -> Program:
    """Any one."""
    draw = random.Random(seed * 8 + world)

    def mode() -> Mode:
        way = draw.choice(("summed", "summed", "ordered", "parts"))
        return Mode(
            draw.choice(("accumulate", "accumulate", "accumulator")),
            draw.choice(("mean", "sum", "Mean", "Mean")),
            draw.choice((torch.float32, torch.float64)),
            draw.random() < 0.4,
            draw.choice((None, None, torch.bfloat16, torch.bfloat16 if way == "parts" else torch.float16)),
            draw.random() < 0.5,
            way,
        )

    modes = mode(), mode()
    alternates, calls = draw.random() < 0.5, []
    for number in range(draw.randint(3, 7)):
        which = number % 2 if alternates else int(draw.random() < 0.2)
        weight = 10.0 ** draw.choice((0, 0, 0, draw.uniform(-30, 30), draw.choice((-30, 30)), draw.uniform(-3, 3)))
        each = []
        for _ in range(world):
            sizes = tuple(draw.choice((0, 1, 1, 2, 3)) for _ in range(draw.choice((0, 1, 2, 2, 3))))
            own = weight * 10.0 ** draw.choice((0, 0, 0, draw.uniform(-4, 4)))
            each.append(Call(which, sizes, own, draw.randrange(1 << 30), None))
        if draw.random() < 0.35:
            for rank in draw.sample(range(world), draw.choice((1, 1, 1, world))):
                places = (*OURS, "state") if modes[which].form == "accumulator" else CALLS
                fault = draw.choice((*places, *(AUX if modes[which].aux and "loss" in places else ()), AFTER))
                sizes = each[rank].sizes if any(each[rank].sizes) else (1,)
                each[rank] = each[rank]._replace(fault=fault, sizes=sizes)
        calls.append(each)
    rows = [list(row) for row in zip(*calls, strict=True)]
    if draw.random() < 0.3:
        row = draw.choice(rows)
        at = draw.randrange(len(row))
        if draw.random() < 0.5:
            row.pop(at)  # skipped
        elif at:
            row[at - 1], row[at] = row[at], row[at - 1]
    longest = max(map(len, rows)) + 1  # what was interrupted is told in the next call: there is one
    for row in rows:
        row += [Call(0, (2,), 1.0, draw.randrange(1 << 30), None) for _ in range(longest - len(row))]
        row.append(Call(0, (1,), 1.0, draw.randrange(1 << 30), None))
    return Program(modes, tuple(map(tuple, rows)))


def params_of(mode: Mode) -> dict[str, torch.Tensor]:
    """Of either function; of different sizes, where the modes say so."""
    wide = 3 if mode.aux else 2
    made = torch.Generator().manual_seed(wide)
    return {
        "a": torch.randn(wide, generator=made, dtype=torch.float64).to(mode.dtype),
        "b": torch.randn(2, 2, generator=made, dtype=torch.float64).to(mode.dtype),
    }


def batches_of(call: Call, mode: Mode) -> list[torch.Tensor]:
    """Micro-batches: rows of inputs, the last column a weight."""
    made = torch.Generator().manual_seed(call.seed)
    wide = 3 if mode.aux else 2
    x = torch.randn(sum(call.sizes), wide + 1, generator=made, dtype=torch.float64).to(mode.dtype)
    x[:, wide] = call.weight
    return list(x.split(list(call.sizes))) if call.sizes else []


class Backward(torch.autograd.Function):
    """Raises in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        """The same."""
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Does not get there."""
        raise Own("backward")


def outcome_of(mode: Mode, params: Any, x: torch.Tensor, fault: str | None) -> Any:
    """What either loss returns."""
    wide = x.shape[1] - 1
    rows = (x[:, :wide] @ params["a"]).unsqueeze(-1) * params["b"].sum(0)
    each = (rows.square().sum(-1) + rows.sum(-1)) / 4
    if fault == "backward":
        each = Backward.apply(each)
    if fault == "loss":
        raise Own("loss")
    if fault == "interrupt":
        raise KeyboardInterrupt
    weights = x[:, wide]
    if mode.returns == "Mean":
        loss: Any = gradacc.Mean((each * weights).sum(), weights.sum() * (torch.nan if fault == "weight" else 1.0))
    else:
        loss = each.sum() if mode.returns == "sum" else each.mean()
        if fault == "weight":
            loss = gradacc.Mean(loss, -1.0)
    if not mode.aux:
        return loss
    if fault == "aux":
        return loss, {"hits": "none"}
    return loss, {"hits": gradacc.Mean((each > 0).sum(), 10**400 if fault == "number" else len(x))}


def losses(modes: tuple[Mode, Mode], current: list[str | None]) -> tuple[Any, Any]:
    """Two functions that are written in two places; ``current[0]`` is what goes wrong in this call."""

    def one(params: Any, x: torch.Tensor) -> Any:
        return outcome_of(modes[0], params, x, current[0])

    def other(params: Any, x: torch.Tensor) -> Any:
        return outcome_of(modes[1], params, x, current[0])

    return one, other


@contextlib.contextmanager
def broken(fault: str | None) -> Iterator[None]:
    """Our own code fails, in the first, or second, place where it can."""
    left = [1]

    def after(*calls: int) -> Any:
        def raising(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] in calls:
                raise Own(fault)
            return original(*args, **kwargs)

        return raising

    with contextlib.ExitStack() as stack:
        if fault == "packing":
            original: Any = wire.pack
            stack.enter_context(mock.patch.object(wire, "pack", after(-1)))
        elif fault == "memory":  # and once more, when it is to be told
            original = Sending.flat
            stack.enter_context(mock.patch.object(Sending, "flat", lambda *args: after(0, -1)(*args)))
        elif fault == AFTER:
            original = _sums.finalize
            stack.enter_context(mock.patch.object(_sums, "finalize", after(0)))
        yield


def play(group: Any, programs: list[Program]) -> list[list[Any]]:
    """One rank's part: for each program, for each call, ``(grads, value)`` or the error."""
    rank = torch.distributed.get_rank(group)
    played = []
    for modes, calls in programs:
        current: list[str | None] = [None]
        made = [_callable(group, mode, loss, current) for mode, loss in zip(modes, losses(modes, current), strict=True)]
        answers: list[Any] = []
        for call in calls[rank]:
            current[0] = call.fault
            try:
                with broken(call.fault):
                    grads, rest = made[call.which](call)
                value = rest[0] if modes[call.which].aux else rest
                answers.append((grads, value.value if isinstance(value, gradacc.Mean) else value))
            except (Exception, KeyboardInterrupt) as error:
                answers.append(f"{type(error).__name__}: {error}")
        played.append(answers)
    return played


def _callable(group: Any, mode: Mode, loss: Any, current: list[str | None]) -> Any:
    how: dict[str, Any] = {"compress": mode.compress, "overlap": mode.overlap}
    options: dict[str, Any] = {
        "has_aux": mode.aux,
        "reduction": "sum" if mode.returns == "sum" else "mean",
        "sync": gradacc.reduce_scatter(group, **how)
        if mode.way == "parts"
        else gradacc.all_reduce(group, ordered=mode.way == "ordered", **how),
    }

    def stream(batches: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        yield from batches
        if current[0] == "iterator":
            raise Own("iterator")

    if mode.form == "accumulate":
        grad_fn = gradacc.accumulate_and_value(loss, **options)

        def accumulated(call: Call) -> Any:
            params = params_of(mode)
            if call.fault == "parameters":
                params["a"] = params["a"].long()
            return grad_fn(params, stream(batches_of(call, mode)))

        return accumulated
    acc = gradacc.accumulator(loss, **options)

    def streamed(call: Call) -> Any:
        params = params_of(mode)
        state = acc.init(params)
        for x in batches_of(call, mode):
            state = acc.update(state, params, x)
        return acc.finalize(params if call.fault == "state" else state)

    return streamed


class Expected(NamedTuple):
    """Of the union, in float64."""

    grads: dict[str, torch.Tensor]
    value: torch.Tensor
    crossing: dict[str, torch.Tensor]
    """The absolute values of the examples' gradients, added up: no rank's gradient, which crosses, is larger."""
    terms: dict[str, torch.Tensor]
    """The absolute values of everything that is added up in a gradient: what cancels is lost in proportion to them, in plain
    torch, too."""
    value_terms: torch.Tensor


def expected(mode: Mode, calls: list[Call]) -> Expected:
    """A loss is a polynomial with positive coefficients, so that at absolute values it and its gradient are sums of terms."""
    params = {name: p.double().requires_grad_() for name, p in params_of(mode).items()}
    sizes = {name: p.detach().abs().requires_grad_() for name, p in params.items()}
    rows = [row.double() for call in calls for x in batches_of(call, mode) for row in x.split(1) if len(row)]
    weights = [float(row[0, -1]) if mode.returns == "Mean" else 1.0 for row in rows]
    whole = math.fsum(weights) if mode.returns != "sum" else 1.0
    plain = mode._replace(returns="mean", aux=False)
    grads, crossing, terms = ({name: torch.zeros_like(p) for name, p in params.items()} for _ in range(3))
    value, value_terms = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for row, weight in zip(rows, weights, strict=True):
        share = weight / whole
        loss, size = outcome_of(plain, params, row, None), outcome_of(plain, sizes, row.abs(), None)
        each = torch.autograd.grad(loss, list(params.values())), torch.autograd.grad(size, list(sizes.values()))
        for name, grad, term in zip(params, *each, strict=True):
            grads[name] += grad * share
            crossing[name] += grad.abs() * share
            terms[name] += term * share
        value += loss.detach() * share
        value_terms += size.detach() * share
    if not rows and mode.returns != "sum":
        value.fill_(torch.nan)
    return Expected(grads, value, crossing, terms, value_terms)


def rounding(mode: Mode) -> float:
    """Relative to what is added up, of the arithmetic: the value and the gradients of a rank."""
    return 1e-13 if mode.dtype == torch.float64 else 2e-6


def compression(mode: Mode, world: int) -> tuple[float, float]:
    """Of a gradient's error by what crosses: relative to that, and absolute. A value crosses as it is."""
    if mode.compress is None or world == 1:
        return 0.0, 1e-300
    # Each contribution is rounded, and their sum, of which nobody has more than all of them.
    if mode.compress == torch.bfloat16:
        return 2.02 * 2.0**-8, 1e-30
    return 2.02 * 2.0**-11, (world + 1) * 4 * 2.0**-24


def numbers(grad: torch.Tensor | gradacc.Shard) -> torch.Tensor:
    """Of a gradient, or of a rank's part."""
    return grad.values if isinstance(grad, gradacc.Shard) else grad


def part(whole: torch.Tensor, grad: torch.Tensor | gradacc.Shard) -> torch.Tensor:
    """What belongs to it, of a whole one."""
    if isinstance(grad, gradacc.Shard):
        assert grad.shape == whole.shape
        return whole.reshape(-1)[grad.offset : grad.offset + grad.length]
    return whole


def is_near(value: torch.Tensor, right: Expected, mode: Mode) -> bool:
    """Whether it is the expected one, NaN included."""
    if right.value.isnan():
        return bool(value.isnan())
    return bool((value.double() - right.value).abs() <= rounding(mode) * right.value_terms + 1e-300)


def of_nothing(where: str, mode: Mode, found: list[Any]) -> list[str]:
    """What is wrong where no rank has an example, and aux is asked for."""
    wrong = []
    for rank, each in enumerate(found):
        if isinstance(each, str):
            if "aux" not in each:
                wrong.append(f"{where}: rank {rank}, without an example, raised {each}")
            continue
        grads, value = each
        if any(numbers(grad).ne(0).any() for grad in grads.values()):
            wrong.append(f"{where}: rank {rank} returned {grads} of no example")
        if not (value.eq(0) if mode.returns == "sum" else value.isnan()):
            wrong.append(f"{where}: rank {rank} returned the value {value} of no example")
    return wrong


def check(title: str, program: Program, answers: list[list[Any]]) -> list[str]:
    """What is wrong: nothing. ``answers``: of each rank."""
    modes, calls = program
    world = len(calls)
    wrong: list[str] = []
    missed: set[int] = set()
    for number, together in enumerate(zip(*calls, strict=True)):
        found = [answer[number] for answer in answers]
        where = f"{title}, call {number}"
        mode = modes[together[0].which]
        raising = any(fails(call, world) for call in together) or len({call.which for call in together}) > 1
        if raising or missed:
            wrong += [f"{where}: rank {r} returned {each}" for r, each in enumerate(found) if not isinstance(each, str)]
            told = any("the call before this one raised" in str(each) for each in found)
            missed = missed if raising and not told else set()
            continue
        if mode.aux and not any(sum(call.sizes) for call in together):
            # Where nothing says what aux is, that rank raises by itself; others may have an empty micro-batch.
            late = {rank for rank, each in enumerate(found) if isinstance(each, str)}
            missed = late if len(late) < world else set()
            wrong += of_nothing(where, mode, found)
            continue
        late = {rank for rank, call in enumerate(together) if call.fault == AFTER}
        missed = late if len(late) < world else set()
        results = [each for rank, each in enumerate(found) if rank not in late]
        wrong += [f"{where}: rank {r} returned {found[r]}" for r in late if not isinstance(found[r], str)]
        wrong += [f"{where}: raised {each}" for each in results if isinstance(each, str)]
        if wrong:
            break
        right = expected(mode, list(together))
        relative, absolute = compression(mode, world)
        for own, value in results:
            for name, grad in right.grads.items():
                near = rounding(mode) * right.terms[name] + relative * right.crossing[name] + absolute
                off = (numbers(own[name]).double() - part(grad, own[name])).abs()
                if not (off <= part(near, own[name])).all():
                    wrong.append(f"{where}: {name} is {own[name]}, not {grad.tolist()} ({mode}, {together})")
                if mode.way != "parts" and own[name].ne(results[0][0][name]).any():
                    wrong.append(f"{where}: {name} has other bits on another rank ({mode}, {together})")
            if not is_near(value, right, mode) or (value != results[0][1] and not right.value.isnan()):
                wrong.append(f"{where}: the value is {value.item()}, not {right.value.item()} ({mode}, {together})")
    return wrong


def run(pool: Pool, world: int, seeds: list[int]) -> tuple[list[str], int]:
    """Everything that is wrong in these programs; and the number of calls that returned on all ranks."""
    programs = [program(seed, world) for seed in seeds]
    answers = pool.run(world, play, programs)
    wrong: list[str] = []
    fine = 0
    for seed, each, own in zip(seeds, programs, zip(*answers, strict=True), strict=True):
        wrong += check(f"seed {seed}, {world} ranks", each, list(own))
        fine += sum(not any(isinstance(answer, str) for answer in one) for one in zip(*own, strict=True))
    return wrong, fine


def main(number: str = "500", first: str = "0") -> int:
    """Runs them; 1 if anything is wrong."""
    pool, began, wrong, fine, size = Pool(), time.monotonic(), 0, 0, 25
    try:
        for start in range(int(first), int(first) + int(number), size):
            world = WORLDS[start // size % len(WORLDS)]
            found, good = run(pool, world, list(range(start, min(start + size, int(first) + int(number)))))
            wrong, fine = wrong + len(found), fine + good
            for line in found:
                print(line, flush=True)
            done = min(start + size, int(first) + int(number)) - int(first)
            print(
                f"{done} sequences, {fine} calls with a result, {wrong} differences, {time.monotonic() - began:.0f} s"
            )
            sys.stdout.flush()
    finally:
        pool.close()
    return int(wrong > 0)


def fails(call: Call, world: int) -> bool:
    """Whether this rank's call raises before any rank has a result."""
    if call.fault in (None, AFTER) or (world == 1 and call.fault in ("packing", "memory")):
        return False
    return call.fault in ("parameters", "state", "iterator", "packing", "memory") or any(call.sizes)


if __name__ == "__main__":
    from tests.sync import fuzz  # what is sent to ranks is pickled by the module's name

    sys.exit(fuzz.main(*sys.argv[1:]))
