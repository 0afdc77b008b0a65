"""The unit in which gradients cross is that of the call before: any sequence of weights is right all the same."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode

import gradacc
from tests.helpers import assert_trees_equal, crossings

HALF, SHORT = torch.float16, torch.bfloat16


def sequence(group, weights, gradient, dtype, options):
    """``weights[call][rank]``; the gradient of each rank is ``gradient`` times its number from 1."""
    rank, current = dist.get_rank(group), [0.0]

    def loss(w, x):
        return gradacc.Mean((w.sum() * gradient * (1 + rank) * x).sum() * current[0], current[0])

    grad_fn = gradacc.accumulate(loss, steps=1, sync=gradacc.all_reduce(group, **options))
    answers = []
    for call in weights:
        current[0] = call[rank]
        with CommDebugMode() as counter:
            (grad,) = grad_fn(torch.ones(1, dtype=dtype), torch.ones(1, dtype=dtype))
        answers.append((grad.item(), crossings(counter)))
    return answers


def check(pool, weights, gradient, dtype, options, rtol):
    answers = pool.run(2, sequence, weights, gradient, dtype, options)
    assert answers[0] == answers[1]
    for (found, _), (one, other) in zip(answers[0], weights, strict=True):
        assert found == pytest.approx(gradient * (one + 2 * other) / (one + other), rel=rtol, abs=0)
    return [count for _, count in answers[0]]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    ("weights", "again"),
    [
        ((1e6, 1e6, 8.0, 8.0), (1, 2, 1)),
        ((1.0, 1e3, 1e6, 1e6), (2, 2, 1)),
        ((8.0, 10.0, 7.0, 16.0, 4.0), (1, 1, 1, 1)),
        ((1e-30, 1e30, 1e30, 1e-30), (2, 1, 2)),
    ],
    ids=str,
)
def test_float16_in_any_sequence(pool, weights, again, overlap):
    """Where the total weight has changed too much, gradients cross once more; not where it has changed a little."""
    options = {"compress": HALF, "overlap": overlap}
    counts = check(pool, [(w, w) for w in weights], 1.0, torch.float32, options, 2.0**-9)
    assert tuple(counts[1:]) == again


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("compress", [None, SHORT])
def test_extreme_weights(pool, dtype, compress, overlap):
    """On all ranks, on one of them, growing and falling."""
    weights = [(1.0, 1.0), (1e30, 1e30), (1e-30, 1e-30), (1e-30, 1e30), (1e30, 1e-30), (1e-30, 1e-30), (2e-30, 1e-30)]
    options = {"compress": compress, "overlap": overlap}
    counts = check(pool, weights, 1.0, dtype, options, 2.0**-7 if compress else 1e-6)
    assert counts[-1] == 1


@pytest.mark.parametrize("overlap", [False, True])
def test_a_small_part_of_the_weight_is_no_change_of_it(pool, overlap):
    """Gradients of a rank that has little cross with those of the others, call after call."""
    counts = check(pool, [(8000.0, 1.25)] * 4, 1.0, torch.float32, {"overlap": overlap}, 1e-6)
    assert counts[1:] == [1, 1, 1]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_float16_that_overflows(pool, reduction, overlap):
    """A gradient beyond 65504, on the wire or only in the sum, is not inf; a true inf or NaN is."""
    for gradient in (1e5, 5e4, 3e4):
        for answers in pool.run(2, overflowing, gradient, reduction, overlap):
            factor = 2.0 if reduction == "sum" else 1.0
            assert answers[0] == pytest.approx([gradient * factor] * 2, rel=2.0**-9)
            assert answers[1] == [float("inf"), pytest.approx(gradient * factor, rel=2.0**-9)]
            assert answers[2] == pytest.approx([gradient * factor] * 2, rel=2.0**-9)


def overflowing(group, gradient, reduction, overlap):
    current = [gradient]

    def loss(w, x):
        return (w * torch.tensor([current[0], gradient])).sum() * x.mean()

    grad_fn = gradacc.accumulate(
        loss, steps=1, reduction=reduction, sync=gradacc.all_reduce(group, compress=HALF, overlap=overlap)
    )
    answers = []
    for value in (gradient, float("inf") if dist.get_rank(group) else gradient, gradient):
        current[0] = value
        answers.append(grad_fn(torch.ones(2), torch.ones(1, 1)).tolist())
    return answers


def test_weight_that_comes_back_from_nothing(pool):
    """A call of weight 0 on all ranks leaves the scale as it is."""
    options = {"compress": HALF}
    answers = pool.run(2, sequence, [(4.0, 4.0), (0.0, 0.0), (4.0, 4.0)], 1.0, torch.float32, options)
    assert answers[0] == answers[1]
    assert [found for found, _ in answers[0]] == [1.5, 0.0, 1.5]
    assert answers[0][2][1] == 1


def large(group, dtype, reduction):
    """A value that only the union's sum is too large for; of a Mean, in aux, too."""

    def loss(w, x):
        whole = (w * x).sum()
        return whole, gradacc.Mean(whole.detach(), 1)

    options = {"has_aux": True, "reduction": reduction, "steps": 1}
    each = torch.tensor([0.75 * torch.finfo(dtype).max], dtype=dtype)
    grad_fn = gradacc.accumulate_and_value(loss, sync=gradacc.all_reduce(group), **options)
    return [grad_fn(torch.ones((), dtype=dtype), each) for _ in range(2)], each


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_a_value_that_is_too_large_in_the_union_is_infinite(pool, dtype, reduction):
    """As a sum of the two is; a mean of them is not."""
    for answers, each in pool.run(2, large, dtype, reduction):
        for grads, (value, aux) in answers:
            assert aux.total.isinf()
            if reduction == "sum":
                assert value.isinf()
                assert grads.isinf()
            else:
                assert_trees_equal([grads, value], [each[0], each[0]])


@pytest.mark.parametrize("factor", [2.0**10, 2.0**13, 2.0**29])
@pytest.mark.parametrize(("gradient", "weight", "falls"), [(1e-34, 1e9, True), (1e34, 1e-9, False)])
def test_weights_that_change_cost_no_digits(pool, gradient, weight, falls, factor):
    """Of gradients near the end of float32's range, as far as plain torch has them."""
    other = weight / factor if falls else weight * factor
    check(pool, [(weight, weight), (other, other)], gradient, torch.float32, {}, 2e-6)


def small(group, sizes, reduction, overlap):
    grad_fn = gradacc.accumulate(
        lambda w, x: (w * x).sum() if reduction == "sum" else (w * x).sum(1).mean(),
        steps=1,
        reduction=reduction,
        sync=gradacc.all_reduce(group, compress=HALF, overlap=overlap),
    )
    answers = []
    for size in sizes:
        with CommDebugMode() as comm:
            grad = grad_fn(torch.ones(2), torch.tensor([[size, size / 8]]))
        answers.append((grad.tolist(), crossings(comm)))
    return answers


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_float16_of_small_gradients(pool, reduction, overlap):
    """None of which vanishes: where float16 has not all its digits for the largest, they cross once more."""
    sizes, factor = (1.0, 1e-9, 1e-5, 1e-30, 1e-3, 0.0, 1.0), 2.0 if reduction == "sum" else 1.0
    for answers in pool.run(2, small, sizes, reduction, overlap):
        for size, (grad, _) in zip(sizes, answers, strict=True):
            assert grad == pytest.approx([size * factor, size * factor / 8], rel=2.0**-9, abs=0)
        assert [count for _, count in answers][1:] == [2, 2, 2, 1, 2, 1]
