"""Under functorch transforms: batches, ensembles and derivatives of accumulated gradients.

Each test is an equation between ``T(accumulate(f))`` and ``T(torch.func.grad(f))`` of the whole batch, for a transform ``T``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import optree
import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import gradacc
from gradacc import Mean
from tests.helpers import assert_trees_close, assert_trees_equal, large

# torch's own forward mode scripts its decompositions
FORWARD_MODE = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

D = torch.float64
X = torch.arange(14, dtype=D).view(7, 2).sin()
XS = torch.stack([X, X.cos(), -X])
W = torch.tensor([0.3, -0.7], dtype=D)
WS = torch.stack([W, 2 * W.cos(), -W])
MASK = torch.tensor([0, 0, 1, 1, 0, 1, 1], dtype=torch.bool)  # its first two micro-batches of one have weight 0


def mean(w, x):
    return torch.tanh(x @ w).square().mean()


def summed(w, x):
    return torch.tanh(x @ w).square().sum()


def tokens(w, x):
    return Mean((torch.tanh(x @ w) * (x[:, 0] > 0)).sum(), (x[:, 0] > 0).sum())


def masked(w, batch):
    x, mask = batch
    return Mean((torch.tanh(x @ w).square() * mask).sum(), mask.sum())


def undefined(w, batch):
    """The same, and 0 / 0 where nothing is real."""
    x, mask = batch
    return Mean((torch.tanh(x @ w).square() * mask).sum() / mask.any(), mask.sum())


def with_aux(w, x):
    r = torch.tanh(x @ w)
    return r.square().mean(), {"each": r, "hits": Mean((r > 0).sum(), len(r)), "average": r.abs().mean()}


def of_the_large_batch(w, x):
    """`with_aux`'s aux."""
    r = torch.tanh(x @ w)
    return {"each": r, "hits": (r > 0).sum() / len(r), "average": r.abs().mean()}


class Cube(torch.autograd.Function):
    """A user's own function, in the form that functorch takes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, cotangent):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * cotangent

    @staticmethod
    def jvp(ctx, tangent):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * tangent


def cubed(w, x):
    return Cube.apply(x @ w).mean()


class Case(NamedTuple):
    """``ours(w, x)`` is accumulated, ``theirs(w, x)`` torch's, over the whole batch."""

    ours: Callable[[Tensor, Tensor], Any]
    theirs: Callable[[Tensor, Tensor], Any]
    rtol: float = 1e-10


def whole(loss: Callable[..., Any]) -> Callable[..., Any]:
    return grad(large(loss))


def window(x: Tensor) -> list[Tensor]:
    return [x[:3], x[3:4], x[4:]]


def two(a, x, b):
    return mean(a * b, x)


def of_aux(w: Tensor, x: Tensor) -> Any:
    grads, aux = gradacc.accumulate(with_aux, steps=3, has_aux=True)(w, x)
    return grads, {**aux, "hits": aux["hits"].value.to(D)}


def with_value(loss: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    def call(w: Tensor, x: Tensor) -> Any:
        grads, value = gradacc.accumulate_and_value(loss, **options)(w, x)
        return grads, value.value if isinstance(value, Mean) else value

    return call


CASES = {
    "mean": Case(gradacc.accumulate(mean, steps=3), whole(mean)),
    "one step": Case(gradacc.accumulate(mean, steps=1), whole(mean)),
    "microbatch_size": Case(gradacc.accumulate(mean, microbatch_size=3), whole(mean)),
    "value": Case(with_value(mean, steps=3), torch.func.grad_and_value(mean)),
    "Mean": Case(gradacc.accumulate(tokens, steps=3), whole(tokens)),
    "Mean, value": Case(with_value(tokens, steps=3), torch.func.grad_and_value(large(tokens))),
    "Mean, some of weight 0": Case(
        lambda w, x: gradacc.accumulate(masked, steps=7)(w, (x, MASK)), lambda w, x: whole(masked)(w, (x, MASK))
    ),
    "Mean, some of 0 / 0": Case(
        lambda w, x: gradacc.accumulate(undefined, steps=7)(w, (x, MASK)), lambda w, x: whole(masked)(w, (x, MASK))
    ),
    "sum": Case(gradacc.accumulate(summed, steps=3, reduction="sum"), whole(summed)),
    "has_aux": Case(
        of_aux,
        lambda w, x: (grad(mean)(w, x), {**of_the_large_batch(w, x), "hits": of_the_large_batch(w, x)["hits"].to(D)}),
    ),
    "window": Case(lambda w, x: gradacc.accumulate(mean)(w, window(x)), whole(mean)),
    "window of Means": Case(lambda w, x: gradacc.accumulate(tokens)(w, window(x)), whole(tokens)),
    "split": Case(gradacc.accumulate(mean, split=window), whole(mean)),
    "in_dims": Case(
        lambda w, x: gradacc.accumulate(lambda w, x: mean(w, x.t()), steps=3, in_dims=(None, 1))(w, x.t()), whole(mean)
    ),
    "tuple argnums": Case(
        lambda w, x: gradacc.accumulate(two, steps=3, argnums=(0, 2))(w, x, w.cos()),
        lambda w, x: grad(two, argnums=(0, 2))(w, x, w.cos()),
    ),
    "dtype": Case(  # float32 throughout, but for the sum
        lambda w, x: gradacc.accumulate(mean, steps=3, dtype=D)(w.float(), x.float()), whole(mean), 1e-5
    ),
    "custom Function": Case(gradacc.accumulate(cubed, steps=3), whole(cubed)),
    "pytree": Case(
        lambda w, x: gradacc.accumulate(lambda p, b: mean(p["w"][0], b["x"]), steps=3)({"w": (w,)}, {"x": x})["w"][0],
        whole(mean),
    ),
    "params closed over": Case(
        lambda w, x: gradacc.accumulate(lambda v, x: mean(v * w, x), steps=3)(torch.ones_like(w), x),
        lambda w, x: grad(lambda v, x: mean(v * w, x))(torch.ones_like(w), x),
    ),
}


def flat(tree: Any) -> Tensor:
    """All leaves of a result in one vector, so that a derivative has one output."""
    return torch.cat([leaf.flatten().to(D) for leaf in optree.tree_leaves(tree, namespace="gradacc")])


def squares(f: Callable[..., Any]) -> Callable[..., Tensor]:
    return lambda w, x: flat(f(w, x)).square().sum()


def stacked(members: list[Any], out_dim: int = 0) -> Any:
    return optree.tree_map(lambda *leaves: torch.stack(leaves, out_dim), *members)


# name -> transform(function, the calls' arguments): the left side's; and the same of a function without a transform
BATCHED: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "over parameters": (
        lambda f: vmap(f, (0, None))(WS, X),
        lambda f: stacked([f(w, X) for w in WS]),
    ),
    "over batches": (
        lambda f: vmap(f, (None, 0))(W, XS),
        lambda f: stacked([f(W, x) for x in XS]),
    ),
    "over both": (
        lambda f: vmap(f)(WS, XS),
        lambda f: stacked([f(w, x) for w, x in zip(WS, XS, strict=True)]),
    ),
    "in_dims, out_dims": (
        lambda f: vmap(f, (1, 2), -1)(WS.t(), XS.permute(1, 2, 0)),
        lambda f: stacked([f(w, x) for w, x in zip(WS, XS, strict=True)], -1),
    ),
    "nested": (
        lambda f: vmap(vmap(f, (None, 0)), (0, None))(WS, XS),
        lambda f: stacked([stacked([f(w, x) for x in XS]) for w in WS]),
    ),
    "chunk_size": (
        lambda f: vmap(f, chunk_size=2)(WS, XS),
        lambda f: stacked([f(w, x) for w, x in zip(WS, XS, strict=True)]),
    ),
}


@pytest.mark.parametrize("transform", BATCHED)
@pytest.mark.parametrize("name", CASES)
def test_batched(name, transform):
    case = CASES[name]
    batched, one_by_one = BATCHED[transform]
    assert_trees_close(batched(case.ours), one_by_one(case.theirs), rtol=case.rtol, atol=case.rtol / 100)


DERIVATIVES: dict[str, Callable[[Any], Any]] = {
    "grad": lambda f: grad(squares(f))(W, X),
    "grad over the batch": lambda f: grad(squares(f), argnums=1)(W, X),
    "jacrev": lambda f: jacrev(lambda w, x: flat(f(w, x)))(W, X),
    "jacfwd": lambda f: jacfwd(lambda w, x: flat(f(w, x)))(W, X),
    "jvp": lambda f: jvp(lambda w, x: flat(f(w, x)), (W, X), (W.cos(), X.cos())),
    "vjp": lambda f: pulled_back(lambda w, x: flat(f(w, x))),
    "hessian": lambda f: hessian(squares(f))(W, X),
    "vmap of grad": lambda f: vmap(grad(squares(f)), (0, None))(WS, X),
    "grad of vmap": lambda f: grad(lambda ws: vmap(squares(f), (0, None))(ws, X).sum())(WS),
    "vmap of jvp": lambda f: vmap(lambda v: jvp(lambda w: flat(f(w, X)), (W,), (v,))[1])(WS),
}
FORWARD = {"jacfwd", "jvp", "hessian", "vmap of jvp"}


def pulled_back(f: Callable[..., Tensor]) -> Any:
    value, pullback = vjp(f, W, X)
    return value, pullback(value.cos())


@pytest.mark.parametrize(
    "transform", [pytest.param(name, marks=FORWARD_MODE) if name in FORWARD else name for name in DERIVATIVES]
)
@pytest.mark.parametrize("name", CASES)
def test_derivatives(name, transform):
    case, derivative = CASES[name], DERIVATIVES[transform]
    assert_trees_close(derivative(case.ours), derivative(case.theirs), rtol=100 * case.rtol, atol=case.rtol)


def test_a_batched_micro_batch_of_weight_0():
    """In one member of the vmap every micro-batch counts, in another some do not, in the last none does."""
    masks = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)
    x = torch.arange(4, dtype=D)

    def loss(w, batch):
        x, mask = batch
        return Mean((w * x * mask).sum() / mask.any(), mask.sum())  # NaN or infinite where nothing is real

    grads = vmap(gradacc.accumulate(loss, steps=2), (None, (None, 0)))(torch.ones((), dtype=D), (x, masks))
    torch.testing.assert_close(grads, torch.tensor([1.5, 2.0, 0.0], dtype=D))


# Compositions from papers. Each is a function of grad_fn, and of a hyperparameter where it has one.


def adapted(grad_fn: Callable[..., Tensor], w: Tensor, x: Tensor, rate: Any = 0.1) -> Tensor:
    """Two steps of gradient descent."""
    for _ in range(2):
        w = w - rate * grad_fn(w, x)
    return w


def maml(grad_fn: Callable[..., Tensor], w: Tensor, task: tuple[Tensor, Tensor]) -> Tensor:
    """The gradient of a task's loss after two inner steps (Finn et al., 2017), with respect to the initial parameters."""
    return grad(lambda w: mean(adapted(grad_fn, w, task[0]), task[1]))(w)


TASK, TASKS = (X[:4], X[4:]), (XS[:, :4], XS[:, 4:])


PAPERS: dict[str, Callable[[Callable[..., Tensor]], Any]] = {
    "MAML": lambda g: maml(g, W, TASK),
    "MAML over tasks": lambda g: vmap(lambda *task: maml(g, W, task))(*TASKS).mean(0),
    "MAML of an ensemble": lambda g: vmap(lambda w: maml(g, w, TASK))(WS),
    "hyper-gradient": lambda g: grad(lambda rate: mean(W - rate * g(W, X), X))(torch.tensor(0.1, dtype=D)),
    "hyper-gradients of each rate": lambda g: jacrev(lambda rates: mean(W - rates * g(W, X), X))(W.cos()),
    "Hessian-vector product": lambda g: jvp(lambda w: g(w, X), (W,), (W.cos(),))[1],
    "vector-Hessian product": lambda g: vjp(lambda w: g(w, X), W)[1](W.cos())[0],
    "Hessian": lambda g: jacfwd(lambda w: g(w, X))(W),
    "gradient penalty": lambda g: grad(lambda w: g(w, X).square().sum())(W),
}


@FORWARD_MODE
@pytest.mark.parametrize("paper", PAPERS)
@pytest.mark.parametrize("loss", [mean, tokens, cubed])
def test_papers(paper, loss):
    assert_trees_close(PAPERS[paper](gradacc.accumulate(loss, steps=3)), PAPERS[paper](whole(loss)))


def test_an_outer_gradient_that_is_accumulated_over_tasks():
    """MAML on the eager engine: the outer micro-batches are tasks, the inner ones a task's examples."""

    def after_two_steps(w, tasks):
        inner = gradacc.accumulate(mean, steps=2)
        return torch.stack([mean(adapted(inner, w, x[:4]), x[4:]) for x in tasks]).mean()

    def expected(w, tasks):
        return torch.stack([mean(adapted(grad(mean), w, x[:4]), x[4:]) for x in tasks]).mean()

    assert_trees_close(gradacc.accumulate(after_two_steps, steps=3)(W, XS), grad(expected)(W, XS))


@FORWARD_MODE
def test_a_hessian_vector_product_is_a_sum_over_micro_batches():
    """``H v = sum_i share_i H_i v``: the product of the large batch is that of its micro-batches, weighted by their sizes."""

    def product(x):
        return jvp(lambda w: gradacc.accumulate(mean, steps=2)(w, x), (W,), (W.cos(),))[1]

    expected = hessian(mean)(W, X) @ W.cos()
    assert_trees_close(product(X), expected)
    assert_trees_close(sum(len(x) / len(X) * product(x) for x in window(X)), expected)


def test_accumulated_twice():
    """The Hessian-vector product by reverse mode, itself accumulated over micro-batches, of a gradient that is."""

    def directional(w, x):
        return gradacc.accumulate(mean, steps=2)(w, x) @ W.cos()

    assert_trees_close(gradacc.accumulate(directional, steps=3)(W, X), hessian(mean)(W, X) @ W.cos())


def dropped(w, x):
    return torch.nn.functional.dropout(x @ w, 0.5).square().mean()


class TestRandomness:
    """``vmap``'s ``randomness=``."""

    GRAD_FN = staticmethod(gradacc.accumulate(dropped, steps=3))

    def grads(self, randomness: str, seed: int = 0) -> Tensor:
        torch.manual_seed(seed)
        return vmap(self.GRAD_FN, (0, None), randomness=randomness)(W.expand(4, 2), X)

    def test_different_draws_for_each_member(self):
        grads = self.grads("different")
        assert len({tuple(g.tolist()) for g in grads}) == 4
        assert_trees_equal(self.grads("different"), grads)
        assert not torch.equal(self.grads("different", 1), grads)

    def test_different_draws_for_each_micro_batch(self):
        """Each of 40 micro-batches is the same example, and its draw would be the same too."""
        x = torch.ones(40, 1, dtype=D)
        grads = vmap(gradacc.accumulate(dropped, steps=40), (0, None), randomness="different")(
            torch.ones(3, 1, dtype=D), x
        )
        # a draw is 0 or 2, its gradient 0 or 8; if they were the same for all micro-batches, the mean would be one of these
        assert ((grads > 0) & (grads < 8)).all()

    def test_the_same_draws_for_each_member(self):
        grads = self.grads("same")
        assert_trees_equal(grads, grads[:1].expand_as(grads))
        torch.manual_seed(0)
        assert_trees_close(grads[0], self.GRAD_FN(W, X))

    def test_the_equation_with_the_draw_as_data(self):
        """What was drawn beforehand is split with the batch."""
        keep = torch.rand(4, 7, dtype=D) < 0.5
        loss = lambda w, b: ((b[0] @ w) * b[1] * 2).square().mean()  # noqa: E731
        grads = vmap(gradacc.accumulate(loss, steps=3), (0, (None, 0)))(W.expand(4, 2), (X, keep))
        assert_trees_close(grads, torch.stack([grad(loss)(W, (X, k)) for k in keep]))

    def test_torchs_own_error(self):
        with pytest.raises(RuntimeError, match="vmap: called random operation while in randomness error mode"):
            self.grads("error")


COMPILED: dict[str, Callable[[Callable[..., Tensor]], Callable[[], Any]]] = {
    "vmap": lambda g: lambda: vmap(g)(WS, XS),
    "MAML": lambda g: lambda: maml(g, W, TASK),
    "Hessian-vector product": lambda g: lambda: jvp(lambda w: g(w, X), (W,), (W.cos(),))[1],
}


@FORWARD_MODE
@pytest.mark.parametrize("name", COMPILED)
def test_compiled(name):
    """One graph around the transform."""
    torch._dynamo.reset()
    compiled = torch.compile(COMPILED[name](gradacc.accumulate(tokens, steps=2)), fullgraph=True, backend="eager")
    assert_trees_close(compiled(), COMPILED[name](whole(tokens))())
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled()


@pytest.mark.parametrize("name", ["vmap", "MAML"])
def test_of_a_compiled_function(name):
    """The transform around the graph."""
    torch._dynamo.reset()
    compiled = torch.compile(gradacc.accumulate(tokens, steps=2), fullgraph=True, backend="eager")
    assert_trees_close(COMPILED[name](compiled)(), COMPILED[name](whole(tokens))())
