"""torchvision where its compiled operators do not load: its Python part is enough for models that are trained.

An index may have no torchvision for its CPU build of torch, and one for another build does not load. Installed like any
package it would then break the import of transformers too, which looks for it. So `make test-slow` puts it into a folder of
its own.
"""

import importlib.util
import sys
from pathlib import Path

import torch

BESIDE = Path(sys.prefix) / "beside"
"""That folder, with timm and torchvision in it."""


def has(package):
    """Whether it is installed, here or there."""
    return importlib.util.find_spec(package) is not None or (BESIDE / package).exists()


def find():
    """Look for packages there too, and let torchvision be imported: that takes two schemas."""
    if BESIDE.exists() and str(BESIDE) not in sys.path:
        sys.path.append(str(BESIDE))
    if importlib.util.find_spec("torchvision") and "torchvision" not in sys.modules:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            try:
                library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            except RuntimeError:  # the compiled ones are there
                break
        _kept.append(library)


_kept: list[torch.library.Library] = []
