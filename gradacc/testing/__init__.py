"""gradacc.testing: is accumulation exact for a loss of yours, and if not, why? And Hypothesis strategies.

``parameter_trees``, ``batches``, ``splits`` and ``microbatch_sizes`` need Hypothesis (``pip install "gradacc[testing]"``),
which is imported when one of them is first asked for; `check_accumulation` does not need it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gradacc.testing._check import check_accumulation
from gradacc.testing._report import Cause, Report, Split

if TYPE_CHECKING:
    from gradacc.testing._strategies import batches, microbatch_sizes, parameter_trees, splits

__all__ = [
    "Cause",
    "Report",
    "Split",
    "batches",
    "check_accumulation",
    "microbatch_sizes",
    "parameter_trees",
    "splits",
]

_STRATEGIES = ("batches", "microbatch_sizes", "parameter_trees", "splits")


def __getattr__(name: str) -> Any:
    if name not in _STRATEGIES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module("gradacc.testing._strategies")
    except ModuleNotFoundError as error:
        if error.name != "hypothesis":
            raise
        raise ImportError(f'gradacc.testing.{name} needs Hypothesis: pip install "gradacc[testing]"') from error
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_STRATEGIES})
