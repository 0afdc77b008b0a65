"""The laws, each a property test, on both engines where both apply.

1. Steps: any split gives the large batch's gradient, value and aux (float64: rtol 1e-10).
2. Identity: ``steps=1`` is `torch.func.grad_and_value`, bit for bit.
5. Purity: inputs are bit-identical afterwards, outputs fresh, and nothing grows over 200 calls.
8. Precision: bfloat16 gradients 256, 1, -256 sum to 1.
"""
