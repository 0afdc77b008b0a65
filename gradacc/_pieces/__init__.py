"""A function evaluated piece by piece: what `gradacc.microbatch` is made of.

- ``divide``: a call's arguments as pieces, by views;
- ``join``: what pieces returned, as what the whole would have returned;
- ``composite``: both, of operations that torch differentiates by itself: under transforms, and while Dynamo traces;
- ``node``, ``pull``, ``closed``, ``held``: one node of plain autograd, in whose backward pass each piece has its own;
- ``functional``: the same for torch.func's transforms;
- ``ranks``: what is reduced, over ranks too.
"""
