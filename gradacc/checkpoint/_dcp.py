"""The steps of `torch.distributed.checkpoint`, one by one.

Its own ``save`` and ``load`` warn in a process without a group, wrap errors in a ``BaseException`` that names no leaf, and
unpickle what they read. So its planners, writer and reader are called here as these two call them, but what crosses between
ranks is up to ``_save.py``, and what the files hold is known from JSON.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from gradacc.checkpoint._shards import Part

if TYPE_CHECKING:  # importing it takes a second
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.metadata import Metadata
    from torch.distributed.checkpoint.planner import SavePlan
    from torch.distributed.checkpoint.storage import WriteResult

METADATA = ".metadata"
"""DCP's own description of its folder, a pickle: written for its tools, never read here."""

_PIECE = 2**20


class Place(NamedTuple):
    """Where a tensor is: so many bytes of a file, and their SHA-256."""

    relative_path: str
    offset: int
    length: int
    sha256: str

    @property
    def transform_descriptors(self) -> None:
        """None: DCP's reader asks for them."""


class Planned(NamedTuple):
    """What one rank could write, before it is known what others have."""

    planner: DefaultSavePlanner
    plan: SavePlan


class Chunk(NamedTuple):
    """Elements of a tensor that is divided, and where they are."""

    offset: int
    length: int
    place: Place


class Written(NamedTuple):
    """What one rank has written: ``results`` for DCP, tensors' places by key, and of tensors that are divided, its chunks."""

    results: list[WriteResult]
    places: dict[str, Place]
    chunks: dict[str, Chunk]


def plan(tensors: dict[str, Tensor | Part], rank: int) -> Planned:
    """The first step, on each rank."""
    from gradacc.checkpoint._planner import SavePlanner

    planner = SavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(tensors), is_coordinator=rank == 0)
    return Planned(planner, planner.create_local_plan())


def write(folder: Path, planned: Planned, plans: Sequence[SavePlan], rank: int) -> tuple[Metadata, Written]:
    """The second step, on each rank: its share of what all have planned. One rank writes what several have.

    Raises:
        OSError: the disk is full, for instance.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    planner = planned.planner
    writer = FileSystemWriter(folder, sync_files=True)
    writer.set_up_storage_writer(rank == 0, rank=rank)
    writer.prepare_local_plan(planned.plan)  # makes the folder
    shares, metadata = planner.create_global_plan(list(plans))
    share = planner.finish_plan(writer.prepare_global_plan(shares)[rank])
    try:
        results = writer.write_data(share, planner).wait()
    except (OSError, RuntimeError) as error:  # torch.save's own says at which byte it was, not that the disk is full
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):
            raise
        raise OSError(reason.errno, reason.strerror, str(folder)) from error
    written = Written(results, {}, {})
    for result in results:
        key, place = result.index.fqn, _place(folder, result.storage_data)
        part = planner.state_dict[key]
        if isinstance(part, Part):
            written.chunks[key] = Chunk(part.facts.offset, part.facts.length, place)
        else:
            written.places[key] = place
    return metadata, written


def finish(folder: Path, metadata: Metadata, results: list[list[WriteResult]]) -> Place:
    """The last step, on rank 0: DCP's own description of the folder."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    writer = FileSystemWriter(
        folder, sync_files=False
    )  # it would be synced before its last bytes leave Python's buffer
    writer.set_up_storage_writer(True, rank=0)
    writer.finish(metadata, results)
    with (folder / METADATA).open("r+b") as stream:
        os.fsync(stream.fileno())
    length = (folder / METADATA).stat().st_size
    return Place(METADATA, 0, length, sha256(folder / METADATA, 0, length))


def read(folder: Path, place: Place, out: Tensor, at: Sequence[int] | None = None) -> None:
    """Read one tensor into ``out``, which is on the CPU and has its dtype, and its shape; or, from ``at`` on, a part of it."""
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
    from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

    start = torch.Size([0] * out.dim())
    index = MetadataIndex("", start)
    metadata = Metadata({}, storage_data={index: place})
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner({"": out}, metadata, is_coordinator=True)
    reader = FileSystemReader(folder)
    reader.set_up_storage_reader(metadata, True)
    wanted = ReadItem(LoadItemType.TENSOR, index, start, index, start if at is None else torch.Size(at), out.shape)
    reader.read_data(LoadPlan([wanted]), planner).wait()


def sha256(file: Path, offset: int, length: int) -> str:
    """The SHA-256 of a part of a file, as far as it is there."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        stream.seek(offset)
        while piece := stream.read(min(length, _PIECE)):
            length -= len(piece)
            digest.update(piece)
    return digest.hexdigest()


def _place(folder: Path, stored: Any) -> Place:
    span = stored.offset, stored.length
    return Place(stored.relative_path, *span, sha256(folder / stored.relative_path, *span))
