"""How one micro-batch's gradient gets into the buffer.

An engine is a module of functions; the caller never chooses one (`gradacc._accumulate` does):

- ``guard()``: the context for everything but the caller's own iterator;
- ``open(params, dtypes) -> buffer``;
- ``admit(tree)``: arguments on their way to the loss;
- ``add(buffer, evaluate, seed) -> (buffer, outcome)``: ``outcome = evaluate(leaves)`` and, where ``seed(outcome)`` is not
  None, ``buffer += seed(outcome) * gradient of outcome.target``;
- ``arrived(buffer)``: whether any loss depended on the parameters;
- ``close(buffer, dtypes, factor) -> gradients``: ``factor * buffer``, zeros where nothing arrived.
"""

from __future__ import annotations

import torch


def transforming() -> bool:
    """Whether a functorch transform (vmap, grad, jvp, …) is active or Dynamo is tracing, so that no value can be read."""
    return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None
