"""Sums in place: what Inductor makes of `gradacc._engines.compiled.inductor`'s operators, and nobody sees it."""

import pytest
import torch
import torch._functorch.config
import torch._inductor.config
from torch._higher_order_ops.scan import scan
from torch.testing import assert_close

import gradacc
from gradacc._engines.compiled import loop
from tests.helpers import some_slow

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
"""Inductor imports it."""

LOOPED = 2 * loop.UNROLLED


@pytest.fixture(autouse=True)
def no_graph_of_an_earlier_run():
    with torch._inductor.config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False):
        yield


def loss_fn(params, x):
    hidden = torch.tanh(x @ params["a"] + params["bias"])
    return (hidden @ params["b"]).square().mean() * params["scale"]


def compiled(function):
    return torch.compile(function, fullgraph=True)


def weights(dtype=torch.float32):
    torch.manual_seed(0)
    return {
        "a": torch.randn(16, 16, dtype=dtype),
        "b": torch.randn(16, 16, dtype=dtype).t(),
        "bias": torch.randn(16, dtype=dtype),
        "scale": torch.ones((), dtype=dtype),
    }


@pytest.mark.slow
@pytest.mark.parametrize("steps", [loop.UNROLLED, LOOPED])
def test_a_matrix_is_added_to_where_it_is(steps):
    """One `addmm_` a weight in a loop's body, and one a weight and later micro-batch where it is unrolled; no other."""
    from torch._inductor.utils import run_and_get_code

    params, x = weights(), torch.randn(3 * LOOPED, 16)
    grad_fn = gradacc.accumulate(loss_fn, steps=steps)
    grads, (code,) = run_and_get_code(compiled(grad_fn), params, x)
    assert_close(grads, grad_fn(params, x))
    sums = 2 if steps > loop.UNROLLED else 2 * (steps - 1)  # of a and of b, whose gradient is a transpose
    assert code.count("aten.addmm_.default(") == sums
    if steps > loop.UNROLLED:
        assert code.count("aten.lt.Scalar(") == code.count("aten.add.Tensor(") == 1  # the loop's counter is no kernel
        assert "cpp_fused_lt" not in code


@pytest.mark.slow
def test_a_loop_writes_to_nothing_but_its_own():
    """Zeros of the same shape in the same graph, two leaves that are one tensor, a second run that goes on, another's scan."""
    params, x = (
        weights(),
        torch.randn(2 * LOOPED * 3 + LOOPED, 16),
    )  # one run of larger micro-batches, one of smaller ones
    params["b"] = params["a"]
    grad_fn = gradacc.accumulate_and_value(loss_fn, steps=2 * LOOPED)

    def step(params, x):
        before = {name: torch.zeros_like(p) for name, p in params.items()}
        grads, value = grad_fn(params, x)
        sums = scan(lambda sofar, row: (sofar + row, sofar * row), before["bias"], x)
        return grads, value, {name: 2 * before[name] + grad for name, grad in grads.items()}, before, sums

    assert_close(compiled(step)(params, x), step(params, x))


@pytest.mark.slow
def test_a_loop_that_is_differentiated_or_concatenates_is_left_alone():
    params, x = weights(), torch.randn(2 * LOOPED, 16)

    def with_rows(params, x):
        return loss_fn(params, x), (x @ params["a"]).square().sum(dim=1)

    grad_fn = gradacc.accumulate(with_rows, steps=LOOPED, has_aux=True)
    assert_close(compiled(grad_fn)(params, x), grad_fn(params, x))

    def slope(scale):
        return gradacc.accumulate(loss_fn, steps=LOOPED)({**params, "scale": scale}, x)["a"].square().sum()

    def large_batch(scale):
        return torch.func.grad(loss_fn)({**params, "scale": scale}, x)["a"].square().sum()

    scale = torch.full((), 2.0, requires_grad=True)
    expected = torch.autograd.grad(large_batch(scale), scale)
    assert_close(torch.autograd.grad(compiled(slope)(scale), scale), expected)


def identity(w, x):
    """Its gradient is a permute of a product, and no transpose."""
    return (x @ w.permute(0, 1)).tanh().square().mean()


def weighted(w, x):
    return gradacc.Mean((x @ w).square().sum(dim=1).mul(x[:, 0] > 0).sum(), (x[:, 0] > 0).sum())


@pytest.mark.parametrize(
    ("loss", "steps"),
    some_slow([(identity, loop.UNROLLED), (identity, LOOPED), (weighted, LOOPED)], (identity, LOOPED)),
    ids=lambda value: getattr(value, "__name__", None),  # not its address, which differs between processes
)
def test_what_looks_like_another_sum(loss, steps):
    torch.manual_seed(0)
    w, x, grad_fn = torch.randn(16, 16), torch.randn(3 * LOOPED, 16), gradacc.accumulate_and_value(loss, steps=steps)
    grads, value = compiled(grad_fn)(w, x)
    expected, large = grad_fn(w, x)
    assert_close(grads, expected)
    if isinstance(large, gradacc.Mean):
        assert_close((value.total, value.weight), (large.total, large.weight))


@pytest.mark.slow
def test_a_state_that_is_an_input_stays_as_it_is():
    """A graph's input as buffer; a state merged with itself; a buffer that is in its own gradient."""
    torch.manual_seed(0)
    init, update, merge, finalize = gradacc.accumulator(identity, reduction="sum")
    other = gradacc.accumulator(lambda w, x, grad: ((w @ grad) * x).sum(), reduction="sum")
    w, x, y = torch.randn(16, 16), torch.randn(16, 16), torch.randn(16, 16)
    state = update(init(w), w, x)
    before = state.grads.clone()

    def many(w, x, y, state):
        once = update(init(w), w, y)
        itself = other.update(other.init(w), w, x, y)
        return (
            finalize(update(state, w, x)),
            finalize(merge(once, once)),
            other.finalize(other.update(itself, w, x, itself.grads)),
        )

    assert_close(compiled(many)(w, x, y, state), many(w, x, y, state))
    assert torch.equal(state.grads, before)
