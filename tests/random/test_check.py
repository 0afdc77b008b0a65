"""Bad input: an error that names the call, what arrived, and the fix."""

import math

import pytest
import torch

from gradacc import random

KEYS = random.split(random.key(0), 3)
X = torch.ones(3, 4)
INDEX = torch.arange(3)

BAD = {
    "a list of keys": (lambda: random.split([1, 2], 2), TypeError, "split: keys is a list; keys are uint64 tensors of shape"),
    "keys of int64": (lambda: random.uniform(KEYS.view(torch.int64)), TypeError, r"shape \(3, 2\) and dtype torch.int64"),
    "a generator": (lambda: random.uniform(torch.Generator()), TypeError, "keys is a torch"),
    "keys of three": (lambda: random.normal(torch.zeros(2, 3, dtype=torch.uint64)), ValueError, r"normal: .*shape \(2, 3\)"),
    "a number": (lambda: random.fold_in(torch.tensor(1, dtype=torch.uint64), 1), ValueError, r"fold_in: .*shape \(\)"),
    "a seed that is a float": (lambda: random.key(1.0), TypeError, r"key: seed is an integer; got 1.0 \(float\)"),
    "a seed that is a bool": (lambda: random.key(True), TypeError, r"got True \(bool\)"),
    "a seed that is a tensor": (lambda: random.key(torch.tensor(1)), TypeError, r"got a tensor of shape \(\)"),
    "a negative seed": (lambda: random.key(-1), ValueError, r"seed is an integer in \[0, 2\*\*64\); got -1"),
    "a seed of 65 bits": (lambda: random.key(2**64), ValueError, "got 18446744073709551616"),
    "n that is a float": (lambda: random.split(KEYS, 2.0), TypeError, "split: n is the number of keys, an integer"),
    "a negative n": (lambda: random.split(KEYS, -1), ValueError, "not negative; got -1"),
    "negative data": (lambda: random.fold_in(KEYS, -1), ValueError, r"fold_in: data is an integer in \[0, 2\*\*64\)"),
    "data that is a float": (lambda: random.fold_in(KEYS, 0.5), TypeError, "fold_in: data is an integer"),
    "data of floats": (lambda: random.fold_in(KEYS, torch.ones(3)), TypeError, "an integer tensor; got .*float32"),
    "data of bools": (lambda: random.fold_in(KEYS, torch.ones(3) > 0), TypeError, "torch.bool"),
    "data of another shape": (
        lambda: random.fold_in(KEYS, torch.arange(4)),
        ValueError,
        r"data of shape \(4,\) for keys of shape \(3, 2\): data has the batch's shape \(3,\)",
    ),
    "data elsewhere": (lambda: random.fold_in(KEYS, INDEX.to("meta")), ValueError, "data is on meta and keys on cpu"),
    "a size for a shape": (lambda: random.uniform(KEYS, 3), TypeError, "uniform: shape is a tuple of sizes"),
    "a shape of floats": (lambda: random.uniform(KEYS, (3.0,)), TypeError, "uniform: shape is a tuple of sizes"),
    "a negative size": (lambda: random.normal(KEYS, (2, -1)), ValueError, r"no size of a shape is negative, got \(2, -1\)"),
    "an integer dtype": (lambda: random.uniform(KEYS, dtype=torch.int64), TypeError, "dtype is float16, .*; got torch.int64"),
    "p below 0": (lambda: random.dropout(X, KEYS, -0.1), ValueError, r"dropout: p is a number in \[0, 1\]; got -0.1"),
    "p above 1": (lambda: random.bernoulli(KEYS, 1.5), ValueError, r"bernoulli: p is a number in \[0, 1\]; got 1.5"),
    "p of NaN": (lambda: random.dropout(X, KEYS, math.nan), ValueError, "got nan"),
    "p that is a tensor": (lambda: random.dropout(X, KEYS, torch.tensor(0.5)), TypeError, "p is a number"),
    "p that is a bool": (lambda: random.dropout(X, KEYS, True), TypeError, r"got True \(bool\)"),
    "x that is a list": (lambda: random.dropout([1.0], KEYS, 0.5), TypeError, "dropout: x is a list; it must be a tensor"),
    "x of integers": (lambda: random.dropout(X.long(), KEYS, 0.5), TypeError, "dropout: x is a tensor of dtype torch.int64"),
    "x elsewhere": (lambda: random.dropout(X.to("meta"), KEYS, 0.5), ValueError, r"x is on meta and keys on cpu; keys.to\("),
    "too few keys": (
        lambda: random.dropout(torch.ones(4, 5), KEYS, 0.5),
        ValueError,
        r"keys of shape \(3, 2\) for x of shape \(4, 5\): .*a key for each example, as split\(key, 4\) makes them",
    ),
    "too many dimensions": (lambda: random.dropout(torch.ones(3), KEYS[:, None], 0.5), ValueError, r"x of shape \(3,\)"),
    "one key in a batch of its own": (lambda: random.dropout(X, KEYS[:1], 0.5), ValueError, r"keys of shape \(1, 2\)"),
    "x and keys the wrong way round": (lambda: random.dropout(KEYS, X, 0.5), TypeError, "keys is a tensor of shape .*float32"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_p_is_checked_where_nothing_is_drawn():
    with pytest.raises(ValueError, match="p is a number"):
        random.dropout(torch.ones(0, 4), KEYS[:0], 2)
