"""Losses over the whole batch: ``through=``.

.. code-block:: text

    outputs = concat(encode(params, microbatch) for each)                               # without a graph
    direct, cotangents = gradients of loss(params, outputs, batch) by params and outputs
    gradient = direct + sum over micro-batches of <encode(params, microbatch), its cotangents>'s

`encoders` says what encodes, and how each divides the batch; `stages` is the above; `composed` the same as one function, where
there is one micro-batch, or a transform.
"""
