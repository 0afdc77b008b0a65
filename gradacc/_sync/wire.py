"""Packing: buckets of gradients, and behind them what else is summed. NOTE [one collective]

NOTE [moments cross]
    Moments do not add up number by number, and as sums of x and x^2 they lose the digits that Chan's formula keeps. So each
    rank writes its own into places of its own, where every other rank adds zeros, and all combine the same ones: ranks times
    the numbers of the moments, as an all-gather of them (torch's ``SyncBatchNorm``) sends.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradacc import _dtypes
from gradacc._cut import Cut
from gradacc._sync import crossing
from gradacc._sync import record as records
from gradacc._sync.crossing import Arrived, Flat
from gradacc._sync.layout import Spec

SMALL, LARGE, PARTS = 1 << 20, 25 << 20, 5
"""Where there is overlap, bytes from which a bucket is full: of a small model a fifth of all its gradients, so that the
backward pass fills several, but not less than `SMALL`. And not the first two of a dtype, which are to leave early:"""

EARLY = (1 / 16, 1 / 4)
"""the parts of that at which they are full: a backward pass that makes bytes four times as fast as the network carries them
fills the next one while the network carries one, which is then never idle (measured so on the slow link of
``benchmarks/boundary.py``)."""


class Gradient(NamedTuple):
    """What is known of one before it is there."""

    shape: torch.Size
    dtype: torch.dtype
    """It is summed in."""
    device: torch.device
    cut: Cut | None = None
    """In which parts it comes back, where each rank gets one."""


class Bucket(NamedTuple):
    """What crosses together: gradients, as real numbers of one dtype on one device."""

    dtype: torch.dtype
    wire: torch.dtype
    device: torch.device
    indices: tuple[int, ...]
    """Which parameters' gradients, in order."""
    numel: int
    """Of all of them, in real numbers; where each rank gets a part, the most that one gets of them."""


class Place(NamedTuple):
    """Where a gradient goes."""

    bucket: int
    offset: int
    numel: int
    cut: Cut | None = None
    """In which parts, where each rank gets one: then offset and numel are those of the widest one."""
    width: int = 1
    """Real numbers of one element."""


class Plan(NamedTuple):
    """All that crosses; the same on every rank."""

    buckets: tuple[Bucket, ...]
    places: tuple[Place, ...]
    """Of every parameter's gradient."""
    vectors: tuple[tuple[int, ...], ...]
    """For every bucket, the numbers of the specs (not 0-dim) that ride behind its gradients."""
    specs: tuple[Spec, ...]
    """Of everything that is not a gradient."""
    header: int
    """The bucket at whose end the records ride."""
    narrow: bool
    """Whether gradients cross in float16."""
    limit: float
    """How far from 1 a gradient's factor may be where they do not: NOTE [scales]."""


class Shape(NamedTuple):
    """What collectives look like from outside: ranks whose calls have the same shape meet in them."""

    flats: tuple[Flat, ...]
    header: int
    """The one behind which the records ride."""
    columns: int
    """Of a record."""


def plan(
    gradients: Sequence[Gradient],
    specs: Sequence[Spec],
    compress: torch.dtype | None,
    order: Sequence[int] | None,
) -> Plan:
    """Where everything goes: one bucket a dtype and device; or several, filled in the ``order`` of a backward pass."""
    filled: list[tuple[torch.dtype, torch.device, list[int]]] = []
    numels: list[int] = []
    whole_numels: list[int] = []
    places: dict[int, Place] = {}
    current: dict[tuple[torch.dtype, torch.device], int] = {}
    left: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    whole = sum(each.shape.numel() * _itemsize(each.dtype, compress) for each in gradients)
    full = max(SMALL, min(LARGE, whole // PARTS))
    first = [int(part * full) for part in EARLY]

    def another(dtype: torch.dtype, device: torch.device) -> int:
        filled.append((dtype, device, []))
        numels.append(0)
        whole_numels.append(0)
        return len(filled) - 1

    for i in range(len(gradients)) if order is None else order:
        each, device, cut = gradients[i], gradients[i].device, gradients[i].cut
        dtype, width = _dtypes.real_dtype(each.dtype), 2 if each.dtype.is_complex else 1
        numel = each.shape.numel() * width
        own = numel if cut is None else cut.width * width
        at = current.get((dtype, device))
        if at is None:
            at = current[dtype, device] = another(dtype, device)
        places[i] = Place(at, numels[at], own, cut, width)
        filled[at][2].append(i)
        numels[at] += own
        whole_numels[at] += numel
        sizes = left.setdefault((dtype, device), [*first, full])
        if order is not None and whole_numels[at] * (compress or dtype).itemsize >= sizes[0]:
            del current[dtype, device]
            sizes[:] = sizes[1:] or sizes
    header = len(filled) - 1
    # Metrics are not rounded, and do not hold up a bucket that could leave early.
    last = {} if compress or order is not None else {dtype: at for (dtype, _), at in current.items()}
    riders: dict[int, list[int]] = {}
    for n, spec in enumerate(specs):
        if spec.shape:
            assert spec.dtype is not None
            dtype = _dtypes.real_dtype(spec.dtype)
            if dtype not in last:
                last[dtype] = another(dtype, gradients[0].device)
            riders.setdefault(last[dtype], []).append(n)
    buckets = tuple(
        Bucket(dtype, compress or dtype if indices else dtype, device, tuple(indices), numel)
        for (dtype, device, indices), numel in zip(filled, numels, strict=True)
    )
    wires = {bucket.wire for bucket in buckets if bucket.indices}
    return Plan(
        buckets,
        tuple(places[i] for i in range(len(gradients))),
        tuple(tuple(riders.get(at, ())) for at in range(len(filled))),
        tuple(specs),
        header,
        torch.float16 in wires,
        2.0**256 if wires == {torch.float64} else 2.0**12,
    )


def _itemsize(dtype: torch.dtype, compress: torch.dtype | None) -> int:
    return dtype.itemsize if compress is None else compress.itemsize * (2 if dtype.is_complex else 1)


def shape(plan: Plan, world: int, fixed: int, way: int) -> Shape:
    """Of a plan, for so many ranks, with records that begin with so many columns."""
    columns = fixed + sum(_width(spec) for spec in plan.specs if not spec.shape)
    slots = world if crossing.is_summed_by_backend(way) else 1
    flats = []
    for at, bucket in enumerate(plan.buckets):
        riders = sum(_numel(plan.specs[n], slots) for n in plan.vectors[at])
        digits = records.digits(columns, bucket.wire) if at == plan.header else 0
        flats.append(Flat(way, bucket.numel, riders, digits, bucket.wire, bucket.dtype, bucket.device))
    return Shape(tuple(flats), plan.header, columns)


def _width(spec: Spec) -> int:
    return 2 if spec.dtype is not None and spec.dtype.is_complex else 1


def _numel(spec: Spec, world: int) -> int:
    return torch.Size(spec.shape).numel() * _width(spec) * (world if spec.gathered else 1)


def pack(place: Place, flat: Tensor, grad: Tensor | None, factor: float | Tensor) -> None:
    """Put a gradient, times ``factor``, in its place; zeros where there is none."""
    part = flat.narrow(-1, place.offset, place.numel)
    if grad is None:
        part.zero_()
        return
    numbers = _dtypes.as_real(grad.detach())
    factor = factor.to(part.device) if isinstance(factor, Tensor) else factor
    if place.cut is None:
        torch.mul(numbers, factor, out=part.view(numbers.shape))
        return
    for run, own in place.cut.rows(numbers.reshape(-1), place.width):
        rows, length = part.narrow(0, run.first, run.ranks), own.shape[1]
        torch.mul(own, factor, out=rows[:, :length])
        rows[:, length:].zero_()


def write_vectors(plan: Plan, at: int, riders: Tensor, values: Sequence[Any] | None, place: tuple[int, int]) -> None:
    """Write a bucket's riders; None: this rank has nothing. ``place``: in which slot, and of how many."""
    slot, slots = place
    offset = 0
    for n in plan.vectors[at]:
        spec = plan.specs[n]
        part = riders.narrow(0, offset, _numel(spec, slots))
        offset += part.numel()
        if values is None or spec.gathered:
            part.zero_()
        if values is not None:
            own = part.chunk(slots)[slot] if spec.gathered and part.numel() else part
            own.copy_(_dtypes.as_real(values[n]).reshape(-1))


def read_vectors(plan: Plan, at: int, riders: Tensor, world: int) -> dict[int, Tensor]:
    """The sums of a bucket's riders, by their number; of what is gathered each rank's. A row of sums, or one of each rank."""
    offset, found = 0, {}
    rows = len(riders)
    for n in plan.vectors[at]:
        spec = plan.specs[n]
        assert spec.dtype is not None
        each = riders.narrow(1, offset, _numel(spec, world if rows == 1 else 1))
        offset += each.shape[1]
        part = each.clone() if spec.gathered else crossing.sum_of(each, each.dtype)
        shape = (world, *spec.shape) if spec.gathered else spec.shape
        shaped = part.view(*shape, 2) if spec.dtype.is_complex else part.view(shape)
        found[n] = torch.view_as_complex(shaped) if spec.dtype.is_complex else shaped
    return found


def record(plan: Plan, fixed: Sequence[Any], values: Sequence[Any] | None, device: torch.device) -> Tensor:
    """One rank's record, int64: ``fixed`` (ints, floats, floating tensors) and every 0-dim value; floats by their bits.

    ``values`` None: zeros.
    """
    columns = [
        _bits(value, value.is_floating_point() if isinstance(value, Tensor) else isinstance(value, float), device)
        for value in fixed
    ]
    for n, spec in enumerate(plan.specs):
        if spec.shape:
            continue
        value: Any = 0 if values is None else values[n]
        if spec.dtype is not None and spec.dtype.is_complex:
            value = torch.as_tensor(value, dtype=torch.complex128)
            columns += [_bits(value.real, True, device), _bits(value.imag, True, device)]
        else:
            number = float(value) if spec.dtype is None and not isinstance(value, Tensor) else value  # of any class
            columns.append(_bits(number, spec.dtype is None or spec.dtype.is_floating_point, device))
    return torch.stack(columns)


def _bits(value: Any, floating: bool, device: torch.device) -> Tensor:
    dtype = torch.float64 if floating else torch.int64
    number = (
        value.to(device, dtype) if isinstance(value, Tensor) else torch.zeros((), dtype=dtype, device=device) + value
    )
    return number.view(torch.int64) if floating else number


def read(plan: Plan, came: Sequence[Arrived], fixed: int, table: Tensor, shares: Tensor) -> list[Any]:
    """The sums over ranks of everything that is not a gradient, in the order of the specs.

    ``table``: the ranks' records, which begin with ``fixed`` columns; ``shares``: what the weighted ones of a rank count for.
    """
    floats, column = table.view(torch.float64), fixed
    vectors: dict[int, Tensor] = {}
    for at, each in enumerate(came):
        vectors |= read_vectors(plan, at, each.riders, len(table))
    sums: list[Any] = []
    for n, spec in enumerate(plan.specs):
        if spec.shape:
            sums.append(vectors[n])
            continue
        if spec.dtype is not None and spec.dtype.is_complex:
            sums.append(torch.complex(floats[:, column].sum(), floats[:, column + 1].sum()))
        else:
            own = (floats if spec.dtype is None or spec.dtype.is_floating_point else table)[:, column]
            sums.append(own if spec.gathered else (own * shares if spec.weighted else own).sum())
        column += _width(spec)
    return sums


def widen(bucket: Bucket, came: Arrived) -> Tensor:
    """A bucket's gradients in the accumulators' dtype."""
    return came.numbers.to(bucket.dtype)


def largest(plan: Plan, came: Sequence[Arrived]) -> Tensor:
    """The largest absolute value of all gradients, as they came; NaN where one is."""
    device = plan.buckets[plan.header].device
    each = [torch.linalg.vector_norm(one.numbers, math.inf).to(device) for one in came if one.numbers.numel()]
    return torch.stack(each).max() if each else torch.ones((), device=device)


def unpack(
    plan: Plan,
    wide: Sequence[Tensor],
    params: Sequence[Tensor],
    strides: Sequence[tuple[int, ...] | None],
    rank: int,
) -> list[Tensor | None]:
    """The gradients, views of the buckets' (`widen`); in memory of their own where they have `strides_of` their own.

    Where each rank gets a part, this one's, of one dimension.
    """
    found: list[Tensor | None] = []
    for place, param, own in zip(plan.places, params, strides, strict=True):
        elements = param.numel() if place.cut is None else place.cut.part(rank)[1]
        grad = wide[place.bucket].narrow(0, place.offset, elements * place.width)
        if param.is_complex():
            # A view, where its numbers begin at an even place.
            grad = torch.view_as_complex((grad if place.offset % 2 == 0 else grad.clone()).view(-1, 2))
        if place.cut is None:
            grad = grad.view(param.shape)
            if own is not None:
                grad = torch.empty_strided(grad.shape, own, dtype=grad.dtype, device=grad.device).copy_(grad)
        found.append(grad)
    return found


def strides_of(param: Tensor, grad: Tensor | None) -> tuple[int, ...] | None:
    """In which a gradient is returned: its parameter's where those are dense and not a contiguous tensor's.

    Kernels that take parameters and gradients by address (a fused optimizer's) pair them so. A parameter that has no numbers
    (of a state) has none: then those of the ``grad`` of this rank, if it has one.
    """
    for tensor in (param, grad):
        if tensor is None or tensor.is_contiguous():
            return None
        if _is_dense(tensor):
            return tuple(tensor.stride())
    return None


def _is_dense(tensor: Tensor) -> bool:
    """Whether its elements fill its memory, each once."""
    filled = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != filled:
                return False
            filled *= size
    return True
