"""How one micro-batch's gradient gets into the buffer.

An engine is a module of functions; the caller never chooses one (`gradacc._accumulate` does):

- ``guard()``: the context for everything but the caller's own iterator;
- ``init(params, dtypes) -> buffer``;
- ``admit(tree)``: arguments on their way to the loss;
- ``update(buffer, evaluate, contribution) -> (buffer, outcome)``: ``outcome = evaluate(leaves)`` and, where
  ``contribution(outcome)`` is not None, ``buffer += cotangent * share * gradient of outcome.target``;
- ``arrived(buffer)``: whether any loss depended on the parameters;
- ``finalize(buffer, dtypes, factor) -> gradients``: ``factor * buffer``, zeros where nothing arrived.
"""

from __future__ import annotations

import torch


def transforming() -> bool:
    """Whether a functorch transform (vmap, grad, jvp, …) is active or Dynamo is tracing, so that no value can be read."""
    return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None
