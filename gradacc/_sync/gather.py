"""Rows of the whole batch: what every rank has of it, gathered once a call; and cotangents, back to their owners.

NOTE [three exchanges]
    A call that needs the rows of all ranks makes, before its gradients cross:

    1. one all-gather of a few numbers: how many rows a rank has, what a row is (a hash), and whether the call has raised there;
    2. one all-gather of the rows themselves, as bytes, of all tensors together, padded to those of the longest rank;
    3. where each rank has evaluated its own part of the loss: one all-to-all of cotangents. A rank gets those of its own rows
       from every other one, and adds them up in the order of ranks.

    A rank that raises takes part in those that are left, and says so in them, as NOTE [failing together] has it: then every
    rank raises before gradients cross. What a rank without rows cannot know (it has seen no output) is told by the first that
    has some.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import pickle
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gradacc import _dtypes
from gradacc._sync import group as groups
from gradacc._sync import problems
from gradacc._sync.agreement import WORDS, fingerprint
from gradacc._sync.channel import Unfinished
from gradacc._sync.turn import Turn

_NUMBERS, _ROWS, _COTANGENTS, _NOTHING = range(4)
"""What crosses next: NOTE [three exchanges]."""


class Row(NamedTuple):
    """What a row of one tensor is."""

    path: str
    dtype: torch.dtype
    trailing: tuple[int, ...]
    """The shape behind the rows."""

    def nbytes(self, dtype: torch.dtype) -> int:
        """Of one row in this dtype."""
        return math.prod(self.trailing) * dtype.itemsize


class Union(NamedTuple):
    """The rows of all ranks."""

    tensors: list[Tensor]
    paths: list[str]
    known: Any
    """What the first rank with rows says of them; None where no rank has any."""
    own: slice
    """Which of them are this rank's."""


class Pulled(NamedTuple):
    """Cotangents of this rank's own rows, summed over ranks."""

    cotangents: list[Tensor | None]
    """None for what no rank has one of."""
    unit: float | None
    """They are in; None where no rank has one."""


class Gather(Unfinished):
    """One call's exchanges of rows. The group is held by torch alone: NOTE [the end of a process] in ``group.py``."""

    def __init__(self, link: Turn, returns: bool) -> None:
        self.link, self.name, self.channel, self.returns = link, link.name, link.channel, returns
        """``returns``: whether cotangents come back."""
        self.next = _NUMBERS
        self.rows: list[Row] = []
        self.sizes: list[int] = []
        """Rows of each rank."""
        self.pulled = 0
        """How many of the tensors have cotangents."""

    def compare(self, value: Tensor) -> None:
        """The value of a loss that every rank evaluates; where it is read for nothing, a difference is found at the end."""
        if value.is_cpu:
            self.link.compare(float(value))

    @property
    def is_first(self) -> bool:
        """Whether this is the first rank of the group."""
        return self.link.group.rank() == 0

    def gather(self, tensors: Mapping[str, Tensor], size: int, pulled: int, known: Any) -> Union:
        """The rows of all ranks.

        Arguments:
            tensors: with ``size`` rows each, by a name for messages, in the same order on every rank; none where ``size`` is 0.
            pulled: how many of them, the first, have cotangents.
            known: what ranks without rows are to be told, which can be pickled.
        """
        group = self.link.group
        rows = [Row(path, each.dtype, tuple(each.shape[1:])) for path, each in tensors.items()]
        self.pulled = pulled
        with self._exchanging():
            known = self._exchange_numbers(group, rows, size, known)
        rank, total = group.rank(), sum(self.sizes)
        begin = sum(self.sizes[:rank])
        own = slice(begin, begin + self.sizes[rank])
        with self._exchanging():
            found = self._exchange_rows(group, list(tensors.values())) if total else []
        return Union(found, [row.path for row in self.rows], known, own)

    def give_back(self, cotangents: Sequence[Tensor | None], unit: Any) -> Pulled:
        """Of cotangents of all rows, in this rank's unit: each rank gets those of its own, summed over ranks.

        ``cotangents``: of the tensors that have some; None where there is none.
        """
        group = self.link.group
        rows = self._pulled_rows()
        used = [cotangent is not None for cotangent in cotangents]
        wide = [None if each is None else each.to(dtype) for each, (_, dtype) in zip(cotangents, rows, strict=True)]
        own = 0.0 if unit is None else float(unit)
        messages, begin = [], 0
        for count in self.sizes:
            parts = [None if each is None else each[begin : begin + count] for each in wide]
            messages.append(self._message(count, [0.0, own, *map(float, used)], parts))
            begin += count
        with self._exchanging():
            arrived = self._exchange_cotangents(group, messages)
        return self._summed(arrived, own or None, self.sizes[group.rank()])

    @property
    def is_over(self) -> bool:
        return self.next == _NOTHING

    def abandon(self) -> None:
        """Take part in what is left, and say that the call has raised."""
        group = self.link.group
        try:
            if self.next == _NUMBERS:
                self._numbers(group, [1] + [0] * (2 + WORDS))
            elif self.next == _ROWS:
                self._bytes_of_all(group, None)
            elif self.next == _COTANGENTS:
                header, nothing = [1.0, 0.0] + [0.0] * self.pulled, [None] * self.pulled
                with contextlib.suppress(RuntimeError):
                    self._exchange_cotangents(group, [self._message(count, header, nothing) for count in self.sizes])
            self.next = _NOTHING
        finally:
            # Nothing was sent where another thread is in the middle of a call.
            if self.next != _NUMBERS:
                self.next = _NOTHING
                self.note_over()

    @contextlib.contextmanager
    def _exchanging(self) -> Iterator[None]:
        """Around what cannot be taken up again where it is interrupted."""
        try:
            yield
        except Exception:
            raise
        except BaseException:
            self.channel.broken, self.next = True, _NOTHING
            raise

    def _of_all(self, group: dist.ProcessGroup, own: Tensor, then: int) -> Tensor:
        """All ranks' ``own``, a row for each; ``then``: what crosses next, as soon as it has left."""
        table = own.new_empty(group.size() * len(own))
        with groups.explaining_errors(self.name, group):
            work = dist.all_gather_single(table, own, group=group, async_op=True)
            self.next = then
            work.wait()
        return table.view(group.size(), -1)

    def _check_raised(self, group: dist.ProcessGroup, raised: Sequence[float]) -> None:
        """Of each rank, whether it has said so: where one has, nothing crosses any more."""
        if any(raised):
            self.next = _NOTHING
            raise problems.calls_raised(self.name, group, [bool(each) for each in raised])

    def _numbers(self, group: dist.ProcessGroup, mine: list[int]) -> list[list[int]]:
        self.channel.start_sending(self.name, group, self.link)
        found: list[list[int]] = self._of_all(group, torch.tensor(mine, device=groups.device(group)), _ROWS).tolist()
        return found

    def _exchange_numbers(self, group: dist.ProcessGroup, rows: list[Row], size: int, known: Any) -> Any:
        coded = _coded(known)
        table = self._numbers(group, [0, size, bool(rows), *fingerprint(rows)])
        self._check_raised(group, [failed for failed, *_ in table])
        seen = [n for n, (_, _, has, *_) in enumerate(table) if has]
        if len({tuple(table[n][3:]) for n in seen}) > 1:
            self.next = _NOTHING
            raise _rows_differ(self.name, group, groups.exchange(self.name, group, rows))
        self.sizes = [count for _, count, *_ in table]
        self.rows = rows
        if not seen:
            self.next = _NOTHING
            return None
        if len(seen) < len(table):
            with groups.explaining_errors(self.name, group):
                self.rows, self.pulled, coded = groups.tell(group, seen[0], (rows, self.pulled, coded))
            if isinstance(coded, str):
                self.next = _NOTHING
                raise TypeError(
                    f"{self.name}: a rank without examples is told what encode returns, which cannot be pickled: {coded}. "
                    "Return it in containers of module-level classes"
                )
            # From here on this rank takes part, whatever a class does that is not the same here.
            known = pickle.loads(coded)
        return known

    def _exchange_rows(self, group: dist.ProcessGroup, tensors: Sequence[Tensor]) -> list[Tensor]:
        flats = self._bytes_of_all(group, tensors)
        self.next = _COTANGENTS if self.returns else _NOTHING
        self._check_raised(group, [float(flat[-1]) for flat in flats])
        found: list[Tensor] = []
        begin = 0
        for row in self.rows:
            width = row.nbytes(row.dtype)
            parts = [
                flat[begin * count : (begin + width) * count].clone().view(row.dtype).view(count, *row.trailing)
                for flat, count in zip(flats, self.sizes, strict=True)
                if count
            ]
            # Where this rank has its own.
            place = tensors[len(found)].device if tensors else self.link.device
            found.append(torch.cat(parts).to(place))
            begin += width
        return found

    def _bytes_of_all(self, group: dist.ProcessGroup, tensors: Sequence[Tensor] | None) -> list[Tensor]:
        """What each rank has, as bytes, and behind them whether its call has raised: that of this rank, without tensors."""
        width = sum(row.nbytes(row.dtype) for row in self.rows)
        # Rows cross where parameters are, which every rank has.
        own = torch.zeros(width * max(self.sizes) + 1, dtype=torch.uint8, device=self.link.device)
        if tensors is None:
            own[-1] = 1
        else:
            filled = 0
            for tensor in tensors:
                part = _bytes(tensor.to(own.device))
                own[filled : filled + part.numel()] = part
                filled += part.numel()
        return list(self._of_all(group, own, _NOTHING))

    def _pulled_rows(self) -> list[tuple[Row, torch.dtype]]:
        """What a cotangent's row is, and the dtype in which they are summed."""
        return [(row, _dtypes.sum_dtype(row.dtype)) for row in self.rows[: self.pulled]]

    def _message(self, count: int, header: Sequence[float], parts: Sequence[Tensor | None]) -> Tensor:
        """To one rank, which has ``count`` rows: a few numbers, and cotangents."""
        found = [torch.tensor(header, dtype=torch.float64)]
        for (row, dtype), part in zip(self._pulled_rows(), parts, strict=True):
            zeros = (count, *row.trailing)
            found.append(torch.zeros(zeros, dtype=dtype, device=self.link.device) if part is None else part)
        return torch.cat([_bytes(each.to(self.link.device)) for each in found])

    def _exchange_cotangents(self, group: dist.ProcessGroup, messages: Sequence[Tensor]) -> list[Tensor]:
        """What every rank sends to this one."""
        given = torch.cat(list(messages))
        # Every rank sends as many bytes to this one as it sends to itself.
        arriving = [messages[group.rank()].numel()] * group.size()
        taken = torch.empty(sum(arriving), dtype=torch.uint8, device=given.device)
        with groups.explaining_errors(self.name, group):
            work = dist.all_to_all_single(
                taken, given, arriving, [each.numel() for each in messages], group=group, async_op=True
            )
            self.next = _NOTHING
            if work is not None:
                work.wait()
        arrived = list(torch.split(taken, arriving))
        self._check_raised(group, [float(_header(each, 1)) for each in arrived])
        return arrived

    def _summed(self, arrived: Sequence[Tensor], unit: float | None, count: int) -> Pulled:
        """What arrived, in one unit: this rank's, or the first that any rank has."""
        width = 2 + self.pulled
        headers = [_header(each, width).tolist() for each in arrived]
        units = [header[1] for header in headers]
        one = unit if unit is not None else next((each for each in units if each), None)
        found: list[Tensor | None] = []
        begin = 8 * width
        for n, (row, dtype) in enumerate(self._pulled_rows()):
            end = begin + count * row.nbytes(dtype)
            total: Tensor | None = None
            for message, header, own in zip(arrived, headers, units, strict=True):
                if header[2 + n] and own and one:
                    part = message[begin:end].clone().view(dtype).view(count, *row.trailing).mul_(own / one)
                    total = part if total is None else total.add_(part)
            found.append(total)
            begin = end
        return Pulled(found, one)


def _coded(known: Any) -> bytes | str:
    """Pickled; or why that cannot be."""
    try:
        return pickle.dumps(known)
    except Exception as error:  # whatever a user's class raises
        return str(error)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)


def _header(message: Tensor, width: int) -> Tensor:
    return message[: 8 * width].clone().view(torch.float64)


def _rows_differ(name: str, group: dist.ProcessGroup, everyone: Sequence[list[Row]]) -> Exception:
    """An error that names the first difference."""
    ranks = dist.get_process_group_ranks(group)
    known = [(rank, rows) for rank, rows in zip(ranks, everyone, strict=True) if rows]
    first, rows = known[0]
    other, others = next((rank, each) for rank, each in known if each != rows)
    pairs = itertools.zip_longest(rows, others)
    one, two = next((a, b) for a, b in pairs if a != b)
    return ValueError(
        f"{name}: what is gathered differs: {_described(one)} on rank {first}, {_described(two)} on rank {other}. Every "
        f"rank of {groups.named(group)} must encode to the same structure, dtypes and shapes behind the batch dimension"
    )


def _described(row: Row | None) -> str:
    if row is None:
        return "nothing more"
    return f"{row.path} is {row.dtype} of shape (rows, {', '.join(map(str, row.trailing))})"
