"""A page's Python as a program of its own, with warnings as errors.

.. code-block:: text

    make test-slow                                 # installs what the recipes need
    python -m tests.recipes docs/recipes/gan.md
"""

import ast
import re
import sys
import warnings
from pathlib import Path

import torch

from tests import vision

THEIRS = [
    ("`is_gradient_checkpointing` is deprecated", FutureWarning),  # peft asks transformers for it
    ("`torch.jit.script` is deprecated", DeprecationWarning),  # torch_geometric calls it when it is imported
]


def blocks(text):
    """The Python blocks of a page."""
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def imported(code):
    """The top-level packages that it imports."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def main(path):
    code = "\n".join(blocks(Path(path).read_text()))
    torch.set_num_threads(1)
    if {"timm", "torchvision"} & set(imported(code)):
        vision.find()
    warnings.simplefilter("error")
    for message, category in THEIRS:
        warnings.filterwarnings("ignore", message, category)
    exec(compile(code, path, "exec"), {})


if __name__ == "__main__":
    main(sys.argv[1])
