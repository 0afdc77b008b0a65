"""gradacc.random: random numbers as functions of keys, which are data and split with the batch.

``dropout(x, keys, p)`` has no state: the mask of an example is a function of its key. See ``docs/randomness.md``.
"""

from gradacc.random._distributions import bernoulli, normal, uniform
from gradacc.random._dropout import dropout
from gradacc.random._keyed import keyed
from gradacc.random._keys import fold_in, key, split

__all__ = [
    "bernoulli",
    "dropout",
    "fold_in",
    "key",
    "keyed",
    "normal",
    "split",
    "uniform",
]
