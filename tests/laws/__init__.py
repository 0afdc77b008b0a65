"""The laws, each a property test, on both engines where both apply.

1. Steps: any split gives the large batch's gradient, value and aux (float64: rtol 1e-10).
2. Identity: ``steps=1`` is `torch.func.grad_and_value`, bit for bit.
3. Monoid: ``merge`` is commutative, associative up to rounding, with ``init`` as identity; ``finalize . merge`` is the large
   batch.
4. Ranks: any shares on any number of ranks (empty ones too) equal one process with the union.
5. Purity: inputs are bit-identical afterwards, outputs fresh, and nothing grows over 200 calls.
6. Transforms: in ``tests/test_transforms.py``, ``tests/test_compositions.py`` and ``tests/engines/compiled``.
7. Boundary: exactly one collective a call, whatever ``steps`` (in the module of law 4).
8. Precision: bfloat16 gradients 256, 1, -256 sum to 1.
13. Keys: with keyed randomness, results depend neither on the split nor on the number of ranks.
"""
