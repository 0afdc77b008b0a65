"""DCP's planner, for parts: imported where it is used, as `torch.distributed.checkpoint` takes a second."""

from __future__ import annotations

from typing import Any

from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex

from gradacc.checkpoint._shards import Part


class SavePlanner(DefaultSavePlanner):
    """DCP's own, which finds the elements of a `Part`."""

    def lookup_object(self, index: MetadataIndex) -> Any:
        """What is written at ``index``."""
        found = self.state_dict[index.fqn]
        return found.values.detach() if isinstance(found, Part) else super().lookup_object(index)
