"""How outputs are put together, and what cannot be."""

import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gradacc import Mean, microbatch
from tests.helpers import some_slow


def _rows(n: int = 7, width: int = 3) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(n), dtype=torch.float64)


def _under_no_transform(f: Callable[..., Any], *args: Any) -> Any:
    return f(*args)


def _under_vmap(f: Callable[..., Any], *args: Any) -> Any:
    batched = torch.vmap(f)(*(torch.stack([arg, arg]) for arg in args))
    return torch.utils._pytree.tree_map_only(Tensor, lambda leaf: leaf[1], batched)


def _derived(f: Callable[..., Any], *args: Any) -> Any:
    leaves = [arg.requires_grad_() for arg in args]
    return torch.autograd.grad(f(*leaves), leaves)


def _compiled(f: Callable[..., Any], *args: Any) -> Any:
    torch.compiler.reset()
    return torch.compile(f, backend="aot_eager", fullgraph=True)(*args)


class LogSumExp:
    """A reducer of pure functions."""

    @staticmethod
    def init(leaf: Tensor) -> Tensor:
        return torch.full_like(leaf, -torch.inf)

    @staticmethod
    def update(state: Tensor, leaf: Tensor) -> Tensor:
        return torch.logaddexp(state, leaf)

    @staticmethod
    def finalize(state: Tensor) -> Tensor:
        return state


TABLE: list[tuple[Any, Any, Callable[[Tensor], Any], Callable[[Tensor], Any]]] = [
    ("concat", 0, lambda x: x.sin(), lambda x: x.sin()),
    ("concat", 1, lambda x: x.sin().mT, lambda x: x.sin().mT),
    ("concat", -1, lambda x: x.sin().mT, lambda x: x.sin().mT),
    ("concat", 0, lambda x: x.repeat_interleave(2, 0), lambda x: x.repeat_interleave(2, 0)),
    ("sum", 0, lambda x: x.sum(0), lambda x: x.sum(0)),
    ("sum", 0, lambda x: (x > 0).sum(), lambda x: (x > 0).sum()),
    ("sum", 0, lambda x: (x > 0).all(0), lambda x: torch.stack([(p > 0).all(0) for p in x.split(2)]).sum(0)),
    ("sum", 0, len, len),
    ("mean", 0, lambda x: x.mean(0), lambda x: x.mean(0)),
    ("max", 0, lambda x: x.amax(0), lambda x: x.amax(0)),
    ("min", 0, lambda x: x.amin(0), lambda x: x.amin(0)),
    ("max", 0, lambda x: (x > 1).any(0), lambda x: (x > 1).any(0)),
    ("stack", 0, lambda x: x.sum(0), lambda x: torch.stack([p.sum(0) for p in x.split(2)])),
    ("stack", 1, lambda x: x.sum(0), lambda x: torch.stack([p.sum(0) for p in x.split(2)], 1)),
    ("stack", -1, lambda x: x.sum(), lambda x: torch.stack([p.sum() for p in x.split(2)])),
    (LogSumExp, 0, lambda x: x.logsumexp(0), lambda x: x.logsumexp(0)),
    ("concat", 0, lambda x: Mean(x.sum(), len(x)), lambda x: Mean(x.sum(), len(x))),
    (
        {"a": "concat", "b": ("sum", "max")},
        0,
        lambda x: {"a": [x, None], "b": (x.sum(), x.amax())},
        lambda x: {"a": [x, None], "b": (x.sum(), x.amax())},
    ),
    (
        {"a": "sum", "b": "concat"},
        {"a": 0, "b": 1},
        lambda x: {"a": x.sum(), "b": x.mT},
        lambda x: {"a": x.sum(), "b": x.mT},
    ),
    ("concat", 0, lambda x: (x, "name", 3, True), lambda x: (x, "name", 3, True)),
]


@pytest.mark.parametrize(
    ("number", "place"),
    some_slow(
        itertools.product(range(len(TABLE)), (_under_no_transform, _under_vmap, _compiled)),
        *itertools.product(range(len(TABLE)), (_under_no_transform, _under_vmap)),
        *((number, _compiled) for number in range(0, len(TABLE), 4)),
    ),
)
def test_what_the_whole_would_have_returned(number: int, place: Callable[..., Any]) -> None:
    out, dims, func, expected = TABLE[number]
    x = _rows()
    by_pieces = microbatch(func, microbatch_size=2, out=out, out_dims=dims)
    if place is _under_vmap and (func is len or number in (16, 17, 19)):
        pytest.skip("torch.vmap returns tensors only")
    actual = place(by_pieces, x)
    wanted = expected(x)
    if isinstance(wanted, Mean):
        actual, wanted = (actual.total, actual.weight), (wanted.total, wanted.weight)
    if isinstance(wanted, dict) and "a" in wanted and isinstance(wanted["a"], list):
        assert actual["a"][1] is None
    if isinstance(wanted, tuple) and len(wanted) == 4:
        assert actual[1:] == wanted[1:]
        actual, wanted = actual[0], wanted[0]
    torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)


def test_rows_that_are_no_examples_are_all_there() -> None:
    """Where pieces have more rows than there are examples, which the memory of all of them has."""
    x, rows = _rows(6), iter([2, 4, 1])
    actual = microbatch(lambda part: part[:1].expand(next(rows), -1), microbatch_size=2)(x)
    torch.testing.assert_close(actual, x[[0, 0, 2, 2, 2, 2, 4]])


@pytest.mark.parametrize("number", [n for n, row in enumerate(TABLE) if row[2] is not len and n not in (5, 6, 11)])
def test_gradients_of_it(number: int) -> None:
    out, dims, func, expected = TABLE[number]
    x = _rows().requires_grad_()

    def scalar(result: Any) -> Tensor:
        leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        return sum((leaf.sin() * torch.linspace(1, 2, leaf.numel()).view_as(leaf)).sum() for leaf in leaves)

    by_pieces = microbatch(func, microbatch_size=2, out=out, out_dims=dims, backward="recompute")
    (wanted,) = torch.autograd.grad(scalar(expected(x)), x)
    (actual,) = torch.autograd.grad(scalar(by_pieces(x)), x)
    torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-12)
    under = torch.func.grad(lambda x: scalar(by_pieces(x)))(x.detach())
    torch.testing.assert_close(under, wanted, rtol=1e-10, atol=1e-12)


def test_ties_share_the_gradient_of_an_extreme() -> None:
    x = torch.tensor([1.0, 3.0, 3.0, 2.0, 3.0], requires_grad=True)
    microbatch(lambda x: x.amax(), microbatch_size=1, out="max")(x).backward()
    torch.testing.assert_close(x.grad, torch.tensor([0, 1 / 3, 1 / 3, 0, 1 / 3]))


def test_a_concatenation_is_written_into_one_memory() -> None:
    x, pointers = _rows(100, 50), []
    from torch.utils._python_dispatch import TorchDispatchMode

    class Cats(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            pointers.append(str(func))
            return func(*args, **(kwargs or {}))

    with Cats(), torch.no_grad():
        y = microbatch(torch.sin, microbatch_size=7)(x)
    assert torch.equal(y, x.sin())
    assert not any("cat" in name or "stack" in name for name in pointers)
    assert sum("new_empty" in name for name in pointers) == 1


@pytest.mark.parametrize(
    "func",
    [lambda x: x, lambda x: x[:, :2], lambda x: (x, x), lambda x: x.view(-1, 3), lambda x: x.expand(2, *x.shape)[0]],
)
@pytest.mark.parametrize("size", [3, 7, 50])
@pytest.mark.parametrize("grad", [True, False])
def test_results_are_in_memory_of_their_own(func: Callable[..., Any], size: int, grad: bool) -> None:
    x = _rows().requires_grad_(grad)
    for place in (_under_no_transform, lambda f, x: torch.func.vjp(f, x)[0]):
        results = place(microbatch(func, microbatch_size=size), x)
        results = results if isinstance(results, tuple) else (results,)
        memories = {leaf.untyped_storage().data_ptr() for leaf in results}
        assert len(memories) == len(results)
        assert x.untyped_storage().data_ptr() not in memories
        for leaf in results:
            assert leaf.requires_grad == grad or place is not _under_no_transform


CONSTANT = torch.ones(3)


def test_a_constant_that_is_returned_is_copied() -> None:
    y = microbatch(lambda x: (x, CONSTANT), steps=1)(_rows())[1]
    y.zero_()
    assert CONSTANT.all()


@pytest.mark.parametrize("place", [_under_no_transform, lambda f, x: torch.func.vjp(f, x)[0]])
def test_no_examples_at_all(place: Callable[..., Any]) -> None:
    x = _rows(0)

    def func(x: Tensor) -> Any:
        return {
            "rows": x @ torch.ones(3, 2, dtype=x.dtype),
            "sum": x.sum(0),
            "mean": x.mean(),
            "of": Mean(x.sum(), x.sum()),
        }

    result = place(
        microbatch(func, microbatch_size=4, out={"rows": "concat", "sum": "sum", "mean": "mean", "of": "sum"}), x
    )
    assert result["rows"].shape == (0, 2)
    assert torch.equal(result["sum"], torch.zeros(3, dtype=x.dtype))
    assert result["mean"].isnan()
    assert result["of"].total == 0


def test_a_list_of_pieces_and_a_generator_of_them() -> None:
    x, w = _rows(9), _rows(3).requires_grad_()
    func = microbatch(lambda w, x: (x @ w.mT).sin(), in_dims=(None, 0))
    expected = (x @ w.mT).sin()
    for pieces in (list(x.split([2, 4, 3])), x.split(4), (part for part in x.split([1, 8]))):
        y = func(w, pieces)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            torch.autograd.grad(y.sum(), w), torch.autograd.grad(expected.sum(), w, retain_graph=True)
        )
    mean = microbatch(lambda x: x.mean(), out="mean")
    torch.testing.assert_close(mean(list(x.split([2, 4, 3]))), x.mean())
    dicts = microbatch(lambda b: b["x"].sum() * b["n"], out="sum")
    torch.testing.assert_close(dicts([{"x": x[:2], "n": 1}, {"x": x[2:], "n": 1}]), x.sum())
    own = x.clone().requires_grad_()
    torch.autograd.backward(func(w.detach(), list(own.split(4))).square().sum())
    (wanted,) = torch.autograd.grad((own @ w.detach().mT).sin().square().sum(), own)
    torch.testing.assert_close(own.grad, wanted)


def test_split_yields_the_pieces() -> None:
    x = _rows(9)
    by_length = microbatch(lambda x: x * 2, split=lambda x: x.split([5, 1, 3]))
    assert torch.equal(by_length(x), 2 * x)


def _two(x: Tensor) -> Tensor:
    return x


@pytest.mark.parametrize(
    ("options", "func", "args", "kind", "said"),
    [
        ({"steps": 2, "microbatch_size": 3}, _two, (), ValueError, "got steps and microbatch_size"),
        ({"steps": 0}, _two, (), ValueError, "steps must be at least 1"),
        ({"steps": 1.5}, _two, (), TypeError, "steps must be an int"),
        ({"steps": 2, "in_dims": [0]}, _two, (), TypeError, "in_dims must be an int, or a tuple"),
        ({"steps": 2, "in_dims": None}, _two, (), TypeError, "in_dims must be an int, or a tuple"),
        ({"steps": 2, "dtype": torch.int32}, _two, (), TypeError, "dtype must be a floating"),
        (
            {"steps": 2, "backward": "never"},
            _two,
            (),
            ValueError,
            "backward must be 'auto', 'recompute' or 'forward', got 'never'",
        ),
        ({"steps": 2}, 3, (), TypeError, "func must be a function, got 3 (int)"),
        ({"steps": 2}, _two, (), TypeError, "there is no positional argument to split"),
        ({"steps": 2, "in_dims": (0, 0)}, _two, (_rows(),), ValueError, "has 2 entries for a call with 1 positional"),
        ({"steps": 2, "in_dims": (None,)}, _two, (_rows(),), ValueError, "splits nothing"),
        ({"steps": 2, "in_dims": 3}, _two, (_rows(),), ValueError, "in_dims has 3 for args[0]"),
        (
            {"steps": 2},
            lambda x, y: x,
            (_rows(4), _rows(5)),
            ValueError,
            "the split dimensions differ: args[0] has 4, args[1] has 5",
        ),
        ({"steps": 2}, _two, (torch.ones(()),), ValueError, "args[0] is a 0-dim tensor"),
        ({"steps": 2}, _two, (["a", "b"],), TypeError, "there is no tensor to split"),
        (
            {},
            lambda x, y: x,
            (_rows(), _rows()),
            ValueError,
            "without steps or microbatch_size one argument is divided",
        ),
        ({}, _two, (3,), TypeError, "which is no iterable of pieces"),
        ({"split": len}, _two, (_rows(),), TypeError, "what split returned is 7 (int)"),
        ({}, _two, ([],), ValueError, "the iterable of pieces is empty"),
        (
            {"steps": 2, "out": "add"},
            _two,
            (_rows(),),
            ValueError,
            "out has 'add' for output; it must be one of 'concat'",
        ),
        (
            {"steps": 2, "out": "max"},
            lambda x: Mean(x.sum(), 1),
            (_rows(),),
            ValueError,
            "out has 'max' for a gradacc.Mean",
        ),
        ({"steps": 2, "out": 3}, _two, (_rows(),), ValueError, "out has 3 (int) for output"),
        (
            {"steps": 2, "out": ("sum", "sum")},
            _two,
            (_rows(),),
            ValueError,
            "is not a pytree prefix of what func returned",
        ),
        ({"steps": 2, "out_dims": "a"}, _two, (_rows(),), TypeError, "out_dims has a str"),
        ({"steps": 2, "out_dims": 2}, _two, (_rows(),), ValueError, "out_dims has 2 for output"),
        (
            {"steps": 2},
            lambda x: x.sum(),
            (_rows(),),
            ValueError,
            "output is a 0-dim tensor, which cannot be concatenated",
        ),
        (
            {"steps": 2},
            lambda x: {"a": len(x)},
            (_rows(),),
            ValueError,
            "output['a'] is 4 (int) in one piece and 3 (int) in another",
        ),
        ({"steps": 2, "out": "mean"}, lambda x: (x > 0).sum(), (_rows(),), TypeError, "whose mean would be rounded"),
        ({"steps": 2, "out": "sum"}, lambda x: "a", (_rows(),), TypeError, "of which there is no 'sum'"),
        ({"steps": 2, "out": "sum"}, _two, (_rows(),), ValueError, "are not reduced to one by 'sum'"),
        (
            {"steps": 2},
            lambda x: x[:, : len(x) - 1],
            (_rows(),),
            ValueError,
            "which cannot be put together by 'concat'",
        ),
        (
            {"steps": 2},
            lambda x: x.to([torch.float32, torch.float64][len(x) % 2]),
            (_rows(),),
            ValueError,
            "float32[7, 3] in one",
        ),
        ({"steps": 2}, lambda x: [x] * len(x), (_rows(),), ValueError, "what is put together has one structure"),
        (
            {"steps": 2},
            lambda x: x.to_sparse(),
            (_rows(),),
            TypeError,
            "which cannot be put together by 'concat'; return it dense",
        ),
        ({"steps": 2}, lambda x: x.numpy(), (_rows(),), TypeError, "is a numpy.ndarray, of which there is no 'concat'"),
        (
            {"steps": 2},
            lambda x: object(),
            (_rows(),),
            TypeError,
            "is a object, of which there is no 'concat'; return a tensor",
        ),
        (
            {"steps": 2, "backward": "forward", "out": "sum"},
            lambda x: (x.sum(), x.sum()),
            (_rows().requires_grad_(),),
            ValueError,
            "func returned several: output[0] and output[1]. detach()",
        ),
        (
            {"steps": 2, "backward": "forward"},
            _two,
            (_rows().requires_grad_(),),
            ValueError,
            "output is of shape (4, 3) and put together by 'concat'",
        ),
    ],
)
def test_bad_input_says_what_arrived_and_what_to_do(
    options: dict[str, Any], func: Any, args: tuple[Any, ...], kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind, match=re.escape(said)) as caught:
        microbatch(func, **options)(*args)
    assert str(caught.value).startswith("microbatch: ")


def test_a_sum_of_means_that_was_pooled_stays_known_as_one() -> None:
    import gradacc

    def loss(params: Tensor, x: Tensor) -> Mean:
        return microbatch(lambda x: Mean((x @ params).sum(), len(x)) + Mean(x.sum(), 1), steps=2)(x)

    with pytest.raises(ValueError, match="loss_fn returned a sum of Means"):
        gradacc.accumulate(loss, steps=2)(torch.ones(3, dtype=torch.float64), _rows())


def test_as_a_decorator() -> None:
    @microbatch(steps=3, out="sum")
    def total(x: Tensor) -> Tensor:
        """Its docstring."""
        return x.sum()

    assert total.__doc__ == "Its docstring."
    torch.testing.assert_close(total(_rows()), _rows().sum())


# Pieces without examples, and numbers among what pieces return.

BACKWARDS = ("auto", "recompute", "forward")


def _batch() -> tuple[Tensor, Tensor]:
    x = torch.tensor([[1.0, 2.0], [3.0, 5.0], [0.5, 7.0]], dtype=torch.float64)
    return x, torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)


def _mean(x: Tensor, w: Tensor) -> Tensor:
    """Of no examples it is NaN, and so is its derivative by ``w``."""
    return w.square().sum() * x.mean()


@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("sizes", [(0, 3), (3, 0), (1, 0, 2), (0, 0, 3)])
def test_a_piece_without_examples_adds_nothing_to_a_mean(sizes: tuple[int, ...], backward: str) -> None:
    x, w = _batch()
    by_pieces = microbatch(_mean, in_dims=(0, None), out="mean", backward=backward)
    mean = by_pieces(list(x.split(sizes)), w)
    torch.testing.assert_close(mean, _mean(x, w))
    (first,) = torch.autograd.grad(mean, w, create_graph=True)
    (expected,) = torch.autograd.grad(_mean(x, w), w, create_graph=True)
    torch.testing.assert_close(first, expected)
    torch.testing.assert_close(torch.autograd.grad(first.sum(), w), torch.autograd.grad(expected.sum(), w))
    quiet = microbatch(lambda x: _mean(x, w.detach()), out="mean")(list(x.split(sizes)))
    torch.testing.assert_close(quiet, mean.detach())


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # of forward mode
def test_a_piece_without_examples_adds_nothing_to_a_mean_under_transforms() -> None:
    x, w = _batch()
    pieces, w = list(x.split([1, 0, 2])), w.detach()
    by_pieces = microbatch(_mean, in_dims=(0, None), out="mean")
    torch.testing.assert_close(
        torch.func.grad_and_value(lambda w: by_pieces(pieces, w))(w),
        torch.func.grad_and_value(lambda w: _mean(x, w))(w),
    )
    many = torch.stack([w, 2 * w])
    torch.testing.assert_close(
        torch.vmap(lambda w: by_pieces(pieces, w))(many), torch.stack([_mean(x, own) for own in many])
    )
    torch.testing.assert_close(
        torch.func.hessian(lambda w: by_pieces(pieces, w))(w), torch.func.hessian(lambda w: _mean(x, w))(w)
    )


@pytest.mark.parametrize("grad", [True, False])
def test_the_mean_of_nothing_at_all_is_nan_and_its_gradient_zero(grad: bool) -> None:
    x, w = _batch()
    nothing = [x[:0], x[:0]]
    for backward in BACKWARDS if grad else BACKWARDS[:1]:
        by_pieces = microbatch(_mean, in_dims=(0, None), out="mean", backward=backward)
        mean = by_pieces(nothing, w if grad else w.detach())
        assert mean.isnan()
        if grad:
            assert torch.equal(torch.autograd.grad(mean, w)[0], torch.zeros(2, dtype=torch.float64))
    assert torch.equal(
        torch.func.grad(lambda w: microbatch(_mean, in_dims=(0, None), out="mean")(nothing, w))(w.detach()),
        torch.zeros(2, dtype=torch.float64),
    )
    assert math.isnan(microbatch(lambda x: float(len(x)), out="mean")(nothing))


def _numbers(*values: Any) -> Callable[[Tensor], Any]:
    left = iter(values)
    return lambda _: next(left)


@pytest.mark.parametrize(
    ("out", "values", "expected"),
    [
        ("sum", [True], 1),
        ("sum", [True, True], 2),
        ("sum", [2, 0.5], 2.5),
        ("mean", [1, 4], 2.0),
        ("mean", [math.nan, 4], math.nan),
        ("max", [1.0, 3.0, 2.0], 3.0),
        ("max", [1.0, math.nan], math.nan),
        ("max", [math.nan, 1.0], math.nan),
        ("min", [1.0, math.nan, 0.0], math.nan),
        ("min", [math.nan, 1.0], math.nan),
        ("min", [True, False], False),
    ],
)
def test_numbers(out: str, values: list[Any], expected: Any) -> None:
    """As tensors of them would be; of one type, however many pieces there are."""
    sizes = [2, 1] if out == "mean" else [1] * len(values)
    actual = microbatch(_numbers(*values), out=out)(list(torch.zeros(sum(sizes), 3).split(sizes)))
    assert type(actual) is type(expected)
    assert actual == expected or (math.isnan(actual) and math.isnan(expected))


@pytest.mark.parametrize("place", [_derived, lambda f, x: torch.func.grad(f)(x)], ids=["autograd", "func.grad"])
def test_a_second_run_of_other_rows_is_an_error(place: Callable[..., Any]) -> None:
    """It would hand a piece's cotangents to the next one."""
    lengths = [2, 2, 1, 2]

    def func(x: Tensor) -> Tensor:
        return (x * 2)[: lengths.pop(0)]

    with pytest.raises(RuntimeError, match="run again for the gradients, returned . rows, and . the first time"):
        place(lambda x: microbatch(func, steps=2, backward="recompute")(x).sum(), _rows(4))
    assert not lengths[1:]
