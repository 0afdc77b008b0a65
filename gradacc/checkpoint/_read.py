"""One tensor of a checkpoint, or a part of it, verified before it is parsed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradacc.checkpoint import _dcp, _leaves
from gradacc.checkpoint._shards import Part


class Source(NamedTuple):
    """The data folder, and where in it tensors are, by key: whole, or in chunks."""

    name: str
    data: Path
    places: dict[str, list[Any]]
    chunks: dict[str, list[list[Any]]]

    def tensor(self, key: str, like: Tensor | Part) -> Tensor:
        """The tensor, or the part of it, that ``like`` is like."""
        what, title = f"like{key}", _leaves.title(like)
        if isinstance(like, Part):
            shape, span, device = like.facts.shape, (like.facts.offset, like.facts.length), like.values.device
            out = torch.empty(span[1], dtype=like.values.dtype)
            if key in self.chunks:
                self._from_chunks(key, out, span, torch.Size(shape).numel(), title)
            elif span[1]:
                self._rows(_dcp.Place(*self.places[key]), what, out, like, title)
            return out.to(device)
        out = torch.empty_like(like, device="cpu", requires_grad=False)
        if 0 in out.stride():
            # A placeholder of one element, expanded: autograd warns of gradients with such strides.
            out = torch.empty(like.shape, dtype=like.dtype, device="cpu")
        if key in self.chunks:
            flat = torch.empty(like.numel(), dtype=like.dtype)
            self._from_chunks(key, flat, (0, len(flat)), len(flat), title)
            out.copy_(flat.view(like.shape))
        else:
            self._read(_dcp.Place(*self.places[key]), what, out, None, title)
        return out.to(like.device)

    def verify(self, stored: Sequence[Any], what: str) -> None:
        """A ValueError where bytes are not those that were written."""
        place = _dcp.Place(*stored)
        file = self.data / place.relative_path
        end = place.offset + place.length
        if not file.is_file():
            problem = "is missing"
        elif file.stat().st_size < end:
            problem = f"is truncated: {file.stat().st_size} bytes of {end}"
        elif _dcp.sha256(file, place.offset, place.length) != place.sha256:
            problem = "has been changed: its SHA-256 is another"
        else:
            return
        raise ValueError(
            f"{self.name}: the checkpoint {self.data.parent} is damaged at {what}: {file} {problem}. Use another checkpoint"
        )

    def _from_chunks(self, key: str, out: Tensor, span: tuple[int, int], numel: int, title: str) -> None:
        """Elements of a tensor that was divided, from whichever chunks have them."""
        begin, end = span[0], sum(span)
        chunks = self.chunks[key]
        if numel != sum(length for _, length, _ in chunks):
            raise ValueError(
                f"{self.name}: the checkpoint {self.data.parent} has not all elements of {title}, which like{key} is, though "
                "it says so. Use another checkpoint"
            )
        for offset, length, stored in chunks:
            first, last = max(begin, offset), min(end, offset + length)
            if first < last:
                into = out[first - begin : last - begin]
                self._read(_dcp.Place(*stored), f"like{key}", into, (first - offset,), title)

    def _rows(self, place: _dcp.Place, what: str, out: Tensor, like: Part, title: str) -> None:
        """Elements of a tensor that was whole: of the rows that have them."""
        shape = like.facts.shape
        row = torch.Size(shape[1:]).numel()
        first = like.facts.offset // row
        last = -(-(like.facts.offset + like.facts.length) // row)
        at, rows = ([first, *[0] * len(shape[1:])], (last - first, *shape[1:])) if shape else ([], ())
        read = torch.empty(rows, dtype=out.dtype)
        self._read(place, what, read, at, title)
        out.copy_(read.view(-1)[like.facts.offset - first * row :][: len(out)])

    def _read(self, place: _dcp.Place, what: str, out: Tensor, at: Sequence[int] | None, title: str) -> None:
        self.verify(place, what)
        try:
            _dcp.read(self.data, place, out, at)
        except Exception as error:
            raise ValueError(
                f"{self.name}: {what} in {self.data / place.relative_path} is not {title}, nor anything else that is safe to "
                "read. Use another checkpoint"
            ) from error
