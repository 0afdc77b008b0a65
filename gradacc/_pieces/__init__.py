"""A function evaluated piece by piece: what `gradacc.microbatch` is made of.

- ``divide``: a call's arguments as pieces, by views;
- ``outputs``, ``join``: what a function returned for a piece; what pieces returned, as what the whole would have returned;
- ``composite``: both, of operations that torch differentiates by itself: while Dynamo traces, and where nothing else works;
- ``forward``, ``node``: the forward pass of plain autograd, and the one node of all pieces that it leaves;
- ``pull``, ``gradients``: one piece and its graph, run backward into gradients of the whole call;
- ``closed``, ``held``: what the function closes over: what requires grad, and what must not change;
- ``functional``: forward and backward passes under torch.func's transforms;
- ``ranks``: what is reduced, over ranks too.
"""
