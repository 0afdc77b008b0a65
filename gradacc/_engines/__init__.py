"""How one micro-batch's gradient gets into the buffer.

An engine is a module of functions; the caller never chooses one (`gradacc._accumulate` does):

- ``guard()``: the context for everything but the caller's own iterator;
- ``init(params, dtypes) -> buffer``; ``resume(params, dtypes, grads, arrived, donated) -> buffer``: of a state, whose
  gradients (None where nothing arrived) are only changed if they are ``donated``;
- ``calling()``: the context of the loss itself;
- ``admit(tree)``: arguments on their way to the loss;
- ``update(buffer, evaluate, contribution, deliver) -> (buffer, outcome)``: ``outcome = evaluate(leaves)`` and, where
  ``contribution(outcome, narrow)`` is not None, ``buffer = growth * buffer + cotangent * share * gradient of outcome.target``
  (``narrow``: whether a number of the backward pass has fewer digits than the buffer); with ``deliver``,
  ``deliver(index, gradient)`` of each as soon as it is final, which takes it out of the buffer;
- ``arrived(buffer)``: whether any loss depended on the parameters;
- ``merge(a, b, shares, donated) -> gradients``: ``shares[0] * a + shares[1] * b``, where one of the shares is 1;
- ``finalize(buffer, dtypes, factor) -> gradients``: ``factor * buffer``, zeros where nothing arrived.
"""
