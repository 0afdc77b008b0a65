"""gradacc: gradient accumulation as a function transform.

``accumulate(loss_fn, steps=k)(params, batch)`` is ``torch.func.grad(loss_fn)(params, batch)`` in the memory of a
micro-batch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from gradacc import checkpoint, data, optim
from gradacc._accumulate import accumulate, accumulate_and_value
from gradacc._accumulator import Accumulator, accumulator
from gradacc._batch_norm import BatchNorm, batch_norm
from gradacc._cross import cross
from gradacc._kept import Kept
from gradacc._mean import Mean
from gradacc._microbatch import MicrobatchOptions, microbatch
from gradacc._module import Apply, functional
from gradacc._moments import Moments
from gradacc._options import AccumulateOptions, AccumulatorOptions, Backward, Nonfinite, Reduction, Sync, Through
from gradacc._reduce import AllReduce, ReduceScatter, all_reduce, reduce_scatter
from gradacc._shard import Shard, ShardFacts
from gradacc._state import AccumulatorState
from gradacc._train import TrainState, train_step
from gradacc._tree import TensorTree
from gradacc._version import __version__

if TYPE_CHECKING:
    from gradacc import random, testing

__all__ = [
    "AccumulateOptions",
    "Accumulator",
    "AccumulatorOptions",
    "AccumulatorState",
    "AllReduce",
    "Apply",
    "Backward",
    "BatchNorm",
    "Kept",
    "Mean",
    "MicrobatchOptions",
    "Moments",
    "Nonfinite",
    "ReduceScatter",
    "Reduction",
    "Shard",
    "ShardFacts",
    "Sync",
    "TensorTree",
    "Through",
    "TrainState",
    "__version__",
    "accumulate",
    "accumulate_and_value",
    "accumulator",
    "all_reduce",
    "batch_norm",
    "checkpoint",
    "cross",
    "data",
    "functional",
    "microbatch",
    "optim",
    "random",
    "reduce_scatter",
    "testing",
    "train_step",
]


def __getattr__(name: str) -> Any:
    """`gradacc.random` and `gradacc.testing` are imported when they are first used."""
    if name not in ("random", "testing"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"gradacc.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
