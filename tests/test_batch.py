"""What a batch is made of: lists among its tensors, layouts without views, and `[x, y]` that may be read in two ways."""

import warnings
from collections import deque
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.immutable_collections import immutable_list
from torch.utils.data import DataLoader, TensorDataset

import gradacc
from gradacc.testing import check_accumulation
from tests.helpers import ENGINES, assert_trees_close

# other tests do not mind it
pytestmark = pytest.mark.filterwarnings("error:.*read as [0-9]+ micro-batch:UserWarning")

D = torch.float64
W = torch.tensor([1.0, -2.0], dtype=D)
X = torch.arange(12, dtype=D).view(6, 2).sin()


def loss_fn(w: Tensor, batch: Any) -> Tensor:
    x = batch["x"] if isinstance(batch, dict) else batch[0]
    return (x @ w).square().mean()


class Sizes(NamedTuple):
    """A record: it has fields."""

    a: int = 1
    b: int = 2
    c: int = 3
    d: int = 4
    e: int = 5
    f: int = 6


class Holder(NamedTuple):
    lengths: Any


# --- lists of numbers and strings: NOTE [lists in a batch]

REFUSED = {
    # name: (batch of six examples, what the error names)
    "numbers": (
        {"x": X, "len": [4, 1, 2, 3, 4, 4]},
        r"args\[1\]\['len'\] is a list of 6 items \(numbers\), one item for each",
    ),
    "tuple": ({"x": X, "len": (4, 1, 2, 3, 4, 4)}, r"args\[1\]\['len'\] is a tuple of 6 items"),
    "deque": ({"x": X, "len": deque([4, 1, 2, 3, 4, 4])}, r"args\[1\]\['len'\] is a deque of 6 items"),
    "bools": ({"x": X, "keep": [True, False] * 3}, r"args\[1\]\['keep'\] is a list of 6"),
    "floats": ({"x": X, "len": [0.5] * 6}, r"args\[1\]\['len'\] is a list of 6"),
    "NumPy floats": ({"x": X, "len": list(np.ones(6))}, r"args\[1\]\['len'\] is a list of 6"),
    "some missing": ({"x": X, "len": [1, None, 2, None, None, 3]}, r"args\[1\]\['len'\] is a list of 6"),
    "beside a tensor": ((X, [4, 1, 2, 3, 4, 4]), r"args\[1\]\[1\] is a list of 6"),
    "ragged": ({"x": X, "ids": [[1, 2], [3], [4], [5, 6, 7], [8], [9]]}, r"args\[1\]\['ids'\] is a list of 6"),
    "records": ({"x": X, "meta": [{"id": n, "name": "a"} for n in range(6)]}, r"args\[1\]\['meta'\] is a list of 6"),
    "deep": ({"x": X, "more": {"a": (None, [1, 2, 3, 4, 5, 6])}}, r"args\[1\]\['more'\]\['a'\]\[1\] is a list of 6"),
    "in a record": ({"x": X, "more": Holder([1, 2, 3, 4, 5, 6])}, r"args\[1\]\['more'\]\.lengths is a list of 6"),
    "transposed": ({"x": X, "size": [[224] * 6, [112] * 6]}, r"args\[1\]\['size'\]\[0\] is a list of 6"),
    "strings": (
        {"x": X, "text": ["a"] * 6},
        r"args\[1\]\['text'\] is a list of 6 items \(strings\), one item for each of the 6",
    ),
    "strings of another number": (
        {"x": X, "text": ["a", "b"]},
        r"args\[1\]\['text'\] is a list of 2 items \(strings\), which",
    ),
}
REFUSED |= {
    "another class of list": (
        {"x": X, "len": immutable_list([4, 1, 2, 3, 4, 4])},
        r"args\[1\]\['len'\] is a immutable_list",
    ),
    "a size": ({"x": X, "len": torch.Size([4, 1, 2, 3, 4, 4])}, r"args\[1\]\['len'\] is a Size of 6"),
    "numbered": ({"x": X, "len": dict(enumerate([4, 1, 2, 3, 4, 4]))}, r"args\[1\]\['len'\] is a dict of 6"),
}
CUTS = {"steps": dict(steps=3), "microbatch_size": dict(microbatch_size=4), "one micro-batch": dict(steps=1)}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("case", REFUSED)
def test_a_list_of_something_of_each_example_is_refused(case, cut, engine):
    batch, message = REFUSED[case]
    with pytest.raises(TypeError, match=f"(?s)^accumulate: {message}.* cannot be split.*None in in_dims"):
        ENGINES[engine](lambda: gradacc.accumulate(loss_fn, **CUTS[cut])(W, batch))


@pytest.mark.parametrize("case", REFUSED)
def test_check_accumulation_names_such_a_list(case):
    batch, message = REFUSED[case]
    with pytest.raises(TypeError, match=f"^check_accumulation: {message}"):
        check_accumulation(loss_fn, W, batch)


PASSED: dict[str, tuple[dict[str, Any], Any]] = {
    # name: (options, what is beside the tensors of six examples)
    "another length": ({}, [224, 224]),
    "a longer one": ({}, [1] * 12),
    "a record of numbers": ({}, Sizes()),
    "a dict of numbers": ({}, dict(zip("abcdef", range(6), strict=True))),
    "records of another number": ({}, [{"id": 1}, {"id": 2}]),
    "a lone string": ({}, "mnli"),
    "a string in a dict": ({}, {"task": "mnli"}),
    "nothing": ({}, [None] * 6),
    "an empty list": ({}, []),
    "said so": (dict(in_dims=(None, {"x": 0, "more": None})), [4, 1, 2, 3, 4, 4]),
    "strings, said so": (dict(in_dims=(None, {"x": 0, "more": None})), ["a"] * 6),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", PASSED)
def test_what_is_no_list_of_examples_passes_whole(case, engine):
    options, more = PASSED[case]

    def loss(w, batch):
        assert batch["more"] == more
        return loss_fn(w, batch)

    actual = ENGINES[engine](lambda: gradacc.accumulate(loss, steps=3, **options)(W, {"x": X, "more": more}))
    torch.testing.assert_close(actual, torch.func.grad(lambda w: loss_fn(w, {"x": X}))(W))


def boxes(number=6, size=6):
    return [{"boxes": torch.ones(size, 4), "label": n} for n in range(number)]


OF_EACH: dict[str, Any] = {
    "dicts": {"x": X, "targets": boxes()},
    "a tuple": {"x": X, "targets": tuple(boxes())},
    "pairs": (X, [(torch.ones(6, 4), torch.ones(6)) for _ in range(6)]),
    "deep": {"x": X, "more": {"targets": boxes()}},
    "numbered": {"x": X, "targets": dict(enumerate(boxes()))},
    "other sizes behind": {"x": X, "masks": [(torch.ones(6, n),) for n in range(6)]},
    "the whole batch": boxes(),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", OF_EACH)
def test_a_list_of_tensors_of_each_example_is_refused(case, engine):
    batch = OF_EACH[case]
    with pytest.raises(
        TypeError, match=r"^accumulate: args\[1\].* 6 items with tensors, and the batch has 6 examples.*a dict"
    ):
        ENGINES[engine](lambda: gradacc.accumulate(loss_fn, steps=3)(W, batch))


def test_so_is_one_in_an_argument_of_its_own():
    with pytest.raises(TypeError, match=r"args\[2\] is a list of 6 items with tensors"):
        gradacc.accumulate(lambda w, x, t: (x @ w).sum(), steps=3, in_dims=(None, 0, 0))(W, X, boxes())


def test_check_accumulation_names_such_a_list_of_tensors():
    with pytest.raises(TypeError, match="6 items with tensors"):
        check_accumulation(loss_fn, W, {"x": X, "targets": boxes()})


def test_bare_tensors_in_a_list_as_long_as_the_batch_are_said():
    """Images of other sizes, whose channels would be divided; and the levels of a pyramid, which are right."""
    batch = {"x": X[:3], "images": [torch.ones(3, 4 + n, 5) for n in range(3)]}
    with pytest.warns(UserWarning, match=r"args\[1\]\['images'\] is a list of 3 items with tensors.*a dict"):
        gradacc.accumulate(loss_fn, steps=3)(W, batch)


PARTS: dict[str, Any] = {
    "one batch in parts": [X, X + 1, X + 2, X + 3, X + 4, X + 5],
    "parts of two examples": [X[:2], X[2:4]],
    "parts that differ": {"x": X[:2], "more": [X[:2], torch.ones(2)]},
    "another number": {"x": X, "views": [{"x": X}, {"x": X}]},
    "names": {"x": X[:2], "views": {"a": {"x": X[:2]}, "b": {"x": X[:2]}}},
    "one example": {"x": X[:1], "targets": boxes(1, 1)},
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", PARTS)
def test_lists_of_tensors_that_are_parts_of_a_batch_are_split(case, engine):
    batch = PARTS[case]
    actual = ENGINES[engine](lambda: gradacc.accumulate(loss_fn, steps=2)(W, batch))
    torch.testing.assert_close(actual, torch.func.grad(loss_fn)(W, batch))


def test_a_list_of_tensors_that_is_meant_whole():
    batch, targets = {"x": X, "targets": None}, boxes()

    def loss(w, b):
        assert len(b["targets"][0]["boxes"]) == 6
        return loss_fn(w, b)

    grads = gradacc.accumulate(loss, steps=3, in_dims=(None, {"x": 0, "targets": None}))(
        W, {**batch, "targets": targets}
    )
    torch.testing.assert_close(grads, torch.func.grad(loss_fn)(W, batch))


@pytest.mark.parametrize("rows", [0, 1])
def test_of_one_example_or_none_a_list_is_that_examples(rows):
    batch = {"x": X[:rows], "len": [4] * rows}
    grads = gradacc.accumulate(lambda w, b: (b["x"] @ w * sum(b["len"])).mean(), steps=2)(W, batch)
    torch.testing.assert_close(grads, 4.0 * X[:rows].sum(0))


@pytest.mark.parametrize("options", [{}, {"split": list}])
def test_in_micro_batches_that_come_divided_lists_are_whole(options):
    parts = [{"x": X[:4], "len": [4, 1, 2, 3]}, {"x": X[4:], "len": [4, 4]}]
    weights = torch.tensor([4.0, 1, 2, 3, 4, 4], dtype=D)

    def loss(w, batch):
        return (batch["x"] @ w * torch.as_tensor(batch["len"])).square().mean()

    torch.testing.assert_close(
        gradacc.accumulate(loss, **options)(W, parts), torch.func.grad(lambda w: (X @ w * weights).square().mean())(W)
    )


def holds_a_list_of(examples: int, tree: Any) -> bool:
    """Whether a list or tuple of this length holds numbers and nothing else, at any depth."""
    if isinstance(tree, dict):
        return any(holds_a_list_of(examples, item) for item in tree.values())
    if not isinstance(tree, (list, tuple)):
        return False
    return any(holds_a_list_of(examples, item) for item in tree) or (len(tree) == examples and holds_numbers(tree))


def holds_numbers(tree: Any) -> bool:
    items = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else None
    return tree is not None if items is None else any(map(holds_numbers, items))


numbers = st.one_of(st.integers(0, 9), st.booleans(), st.floats(0, 1), st.none())
trees = st.recursive(
    numbers,
    lambda children: st.one_of(
        st.lists(children, max_size=4),
        st.lists(children, max_size=4).map(tuple),
        st.dictionaries(st.sampled_from("abc"), children, max_size=3),
    ),
    max_leaves=8,
)


@given(more=trees, examples=st.integers(2, 4), steps=st.integers(1, 4))
@example(more=[[1], [2]], examples=2, steps=2)
@example(more={"a": [[1, 2], [3]]}, examples=2, steps=2)
def test_numbers_are_whole_or_refused(more, examples, steps):
    def loss(w, batch):
        assert batch["more"] == more
        return (batch["x"] @ w).square().mean()

    run = gradacc.accumulate(loss, steps=steps)
    if holds_a_list_of(examples, more):
        with pytest.raises(TypeError, match="cannot be split"):
            run(W, {"x": X[:examples], "more": more})
    else:
        actual = run(W, {"x": X[:examples], "more": more})
        torch.testing.assert_close(actual, torch.func.grad(lambda w: (X[:examples] @ w).square().mean())(W))


# --- a list of bare tensors: NOTE [one batch or micro-batches]


def pair(w: Tensor, batch: Any) -> Tensor:
    """What most losses of a `DataLoader`'s batch do."""
    x, y = batch[0], batch[1]
    return (x @ w - y).square().mean()


Y = X.sum(1).cos()
ONE_BATCH = {
    "dtypes": [X, torch.arange(6)],
    "dimensions": [X, Y],
    "tuple": (X, Y),
    "bytes and floats": [X.to(torch.uint8), X],
    "a tensor and nothing": [X, None],
    "a tensor and strings": [X, ["a"] * 6],
    "a tensor and a dict": [X, {"mask": X}],
    "a dict and a tensor": [{"mask": X}, X],
    "a tensor and a number": [X, 3],
    "a tensor and an array": [X, np.ones((6, 2))],
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", ONE_BATCH)
def test_parts_that_fit_no_one_loss_are_one_batch(case, engine):
    def never(w, batch):
        raise AssertionError("the loss ran")

    with pytest.raises(TypeError, match=r"^accumulate: the batch is a (list|tuple) of 2 \(.*Pass steps=.*split=iter"):
        ENGINES[engine](lambda: gradacc.accumulate(never)(W, ONE_BATCH[case]))


AMBIGUOUS = {
    "alike": [X, X.cos()],
    "one": [X],
    "tuple of one": (X,),
    "padded to different lengths": [torch.ones(6, 3), torch.ones(6, 4)],
    "integers": [torch.ones(6, 3, dtype=torch.int64)] * 4,
    "arrays": [np.ones((6, 2)), np.zeros((6, 1))],
    "a column and a column": [X[:, 0], X[:, 1]],
    "a list of pieces": list(X.split(2)),
    "the same twice": (X, X),
}


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_what_can_be_read_in_two_ways_is_said(case):
    batch = AMBIGUOUS[case]
    loss = lambda w, x: gradacc.Mean((w * torch.as_tensor(x)).sum(), len(x))  # noqa: E731
    w = torch.ones(())
    message = (
        rf"accumulate: the batch is a .* of {len(batch)} \(.*read as {len(batch)} micro-batch.*pass steps=.*split=iter"
    )
    with pytest.warns(UserWarning, match=message) as caught:
        warned = gradacc.accumulate(loss)(w, batch)
    assert caught[0].filename == __file__
    for quiet in (
        gradacc.accumulate(loss, split=iter)(w, batch),
        gradacc.accumulate(loss)(w, iter(batch)),
        gradacc.accumulate(loss)(w, (part for part in batch)),
    ):
        assert torch.equal(warned, quiet)


HONEST = {
    "of different sizes": [X[:4], X[4:]],
    "an empty one": [X, X[:0]],
    "what split returns": X.split(2),
    "what chunk returns": X.chunk(3),
    "what split of a part returns": torch.cat([X, X, X])[6:12].split(3),
    "what split returns of one": X.split(6),
    "what split returns, along another dimension": X.T.split(2, 1),
    "dicts": [{"x": X[:3]}, {"x": X[3:]}],
    "pairs": [(X[:3], Y[:3]), [X[3:], Y[3:]]],
    "a window": next(iter(gradacc.data.windows(DataLoader(X, batch_size=2), 3))),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", HONEST)
def test_micro_batches_are_nothing_to_speak_of(case, engine):
    def loss(w, part):
        x = part["x"] if isinstance(part, dict) else part[0] if isinstance(part, (list, tuple)) else part
        return ((x.T if along else x) @ w).square().mean()

    along = case.endswith("another dimension")
    options = dict(in_dims=(None, 1)) if along else {}
    actual = ENGINES[engine](lambda: gradacc.accumulate(loss, **options)(W, HONEST[case]))
    torch.testing.assert_close(actual, torch.func.grad(lambda w: (X @ w).square().mean())(W))


@pytest.mark.parametrize("make", [deque, lambda parts: dict(enumerate(parts)).values()], ids=["deque", "values"])
def test_so_are_other_containers_of_parts(make):
    with pytest.warns(UserWarning, match="read as 2 micro-batches"):
        gradacc.accumulate(lambda w, x: (x @ w).square().mean())(W, make([X, X + 1]))
    with pytest.raises(TypeError, match="one batch in parts"):
        gradacc.accumulate(lambda w, x: (x @ w).square().mean())(W, make([X, torch.arange(6)]))


def test_numbers_as_micro_batches_are_nothing_to_speak_of():
    parts = [torch.tensor(1.0), torch.tensor(3.0)]
    grads = gradacc.accumulate(lambda w, t: gradacc.Mean(w * t, 1))(torch.ones(()), parts)
    assert grads == 2.0


shapes = st.tuples(
    st.integers(1, 3), st.lists(st.integers(1, 3), max_size=2), st.lists(st.integers(1, 3), max_size=2), st.booleans()
)


@given(shapes=shapes, number=st.integers(1, 2), seed=st.integers(0, 9))
@settings(max_examples=60)
def test_a_loaders_batch_is_never_silently_two_micro_batches(shapes, number, seed):
    """Whatever a DataLoader of tensors yields: split by ``steps`` it is right, without it is an error or a warning."""
    rows, first, second, counts = shapes
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(rows, *first, generator=generator, dtype=D)
    y = torch.rand(rows, *second, generator=generator, dtype=D)
    columns = (x, (9 * y).long() if counts else y)[:number]
    (batch,) = DataLoader(TensorDataset(*columns), batch_size=rows)
    assert type(batch) is list

    def loss(w, batch):
        return sum((w * part).flatten().sum() / len(part) for part in (batch[n] for n in range(number)))

    w = torch.ones((), dtype=D)
    expected = torch.func.grad(loss)(w, batch)
    torch.testing.assert_close(gradacc.accumulate(loss, steps=2)(w, batch), expected)
    with pytest.raises((TypeError, UserWarning), match="the batch is a list of"):  # warnings are errors here
        gradacc.accumulate(loss)(w, batch)


@given(cuts=st.lists(st.integers(0, 6), max_size=3).map(sorted), as_tuple=st.booleans())
def test_a_list_of_micro_batches_is_right_or_said(cuts, as_tuple):
    sizes = [high - low for low, high in zip([0, *cuts], [*cuts, 6], strict=True)]
    parts = [part.clone() for part in X.split(sizes)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        actual = gradacc.accumulate(lambda w, x: (x @ w).square().mean())(W, tuple(parts) if as_tuple else parts)
    torch.testing.assert_close(actual, torch.func.grad(lambda w: (X @ w).square().mean())(W))
    assert len(caught) == (len(set(sizes)) == 1)


def test_the_named_case_is_loud():
    x, y = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0], [0.0]])
    loss = lambda w, batch: (batch[0] @ w - batch[1]).square().mean()  # noqa: E731
    w = torch.ones(2, 1)
    torch.testing.assert_close(gradacc.accumulate(loss, steps=2)(w, [x, y]), torch.func.grad(loss)(w, [x, y]))
    with pytest.raises(UserWarning, match=r"a list of 2 \(float32\[2, 2\], float32\[2, 1\]\)"):
        gradacc.accumulate(loss)(w, [x, y])
    with pytest.raises(UserWarning, match=r"a list of 1 \(float32\[2, 2\]\), read as 1 micro-batch\."):
        gradacc.accumulate(lambda w, batch: (batch[0] @ w).square().mean())(w, [x])


@pytest.mark.parametrize("split", [None, iter])
def test_a_losss_own_error_says_what_it_was_given(split):
    def unpack(w, batch):
        x, y = batch
        return pair(w, (x, y))

    with pytest.raises(ValueError, match="too many values") as caught:
        gradacc.accumulate(unpack, split=split)(W, [X[:4], X[1:]])
    notes = getattr(caught.value, "__notes__", [])
    assert len(notes) == (split is None)
    assert all("a list of 2 (float64[4, 2], float64[5, 2]), read as 2 micro-batches" in note for note in notes)


@pytest.mark.parametrize("given", [X, X.numpy()])
def test_a_tensor_or_an_array_is_one_batch(given):
    with pytest.raises(TypeError, match="must be an iterable of micro-batches, got a "):
        gradacc.accumulate(loss_fn, reduction="sum")(W, given)


def test_compiled_it_is_said_when_it_is_traced():
    torch._dynamo.reset()
    grad_fn = gradacc.accumulate(lambda w, x: (x @ w).square().mean())
    compiled = torch.compile(grad_fn, fullgraph=True, backend="eager")
    with pytest.warns(UserWarning, match="accumulate: the batch is a list of 2"):
        warned = compiled(W, [X[:3], X[3:]])
    assert_trees_close(warned, torch.func.grad(lambda w: (X @ w).square().mean())(W))
    quiet = torch.compile(
        gradacc.accumulate(lambda w, x: (x @ w).square().mean(), split=iter), fullgraph=True, backend="eager"
    )
    assert torch.equal(quiet(W, [X[:3], X[3:]]), warned)


# --- layouts

LAYOUTS = {
    "jagged": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    "sparse COO": lambda: torch.eye(2).to_sparse(),
    "sparse CSR": lambda: torch.eye(2).to_sparse_csr(),
    "sparse CSC": lambda: torch.eye(2).to_sparse_csc(),
    "sparse BSR": lambda: torch.eye(2).to_sparse_bsr(1),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "mkldnn": lambda: torch.eye(2).to_mkldnn(),
}
beta = pytest.mark.filterwarnings("ignore:Sparse|The PyTorch API of nested:UserWarning")


def dense(tensor: Tensor) -> Tensor:
    return tensor.to_padded_tensor(0.0) if tensor.is_nested else tensor.to_dense()


@beta
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_without_views_is_named(layout):
    batch = {"x": torch.ones(2), "y": LAYOUTS[layout]()}
    layout = batch["y"].layout
    message = rf"accumulate: args\[1\]\['y'\] is a .*tensor of .* layout {layout}.*(to_dense|to_padded_tensor).*split="
    with pytest.raises(TypeError, match=message):
        gradacc.accumulate(lambda w, b: (w * dense(b["y"])).sum(), steps=2)(torch.ones(()), batch)
    with pytest.raises(TypeError, match=f"check_accumulation: .*layout {layout}"):
        check_accumulation(lambda w, b: (w * dense(b["y"])).sum(), torch.ones(()), batch)


@beta
@pytest.mark.parametrize("options", [{}, {"in_dims": (None, 0)}])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_micro_batches_of_any_layout_are_counted(layout, options):
    parts = [LAYOUTS[layout](), LAYOUTS[layout]()]
    loss = lambda w, x: (w * dense(x)).sum(1).mean()  # noqa: E731
    grads = gradacc.accumulate(loss, split=iter, **options)(torch.ones(()), parts)
    torch.testing.assert_close(grads, dense(parts[0]).sum(1).mean())
    init, update, _, finalize = gradacc.accumulator(loss, **options)
    w = torch.ones(())
    torch.testing.assert_close(finalize(update(init(w), w, parts[0]))[0], grads)
    whole = gradacc.accumulate(lambda w, x, y: loss(w, y) * x.mean(), steps=2)(w, torch.ones(2), parts[0])
    torch.testing.assert_close(whole, grads)


@beta
@pytest.mark.parametrize("layout", ["jagged", "nested"])
def test_nested_tensors_are_counted_along_dim_0(layout):
    with pytest.raises(
        ValueError, match=r"in_dims has 1 for args\[1\], a nested tensor of 2 items: its examples are along"
    ):
        gradacc.accumulate(lambda w, x: (w * dense(x)).mean(), in_dims=(None, 1))(
            torch.ones(()), iter([LAYOUTS[layout]()])
        )


@beta
@pytest.mark.parametrize("layout", LAYOUTS)
def test_aux_of_another_layout_is_joined_or_named(layout):
    joined = layout == "sparse COO"
    parts = [LAYOUTS[layout](), LAYOUTS[layout]()]
    run = gradacc.accumulate(lambda w, x: ((w * dense(x)).mean(), {"x": x}), has_aux=True, split=iter)
    if joined:
        torch.testing.assert_close(run(torch.ones(()), parts)[1]["x"].to_dense(), torch.cat([torch.eye(2)] * 2))
        return
    with pytest.raises(TypeError, match=rf"aux\['x'\] is a .*layout {parts[0].layout}, which cannot be concatenated"):
        run(torch.ones(()), parts)


@beta
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_of_another_layout_are_refused(layout):
    with pytest.raises(TypeError, match="params is a sparse or nested tensor"):
        gradacc.accumulate(lambda w, x: (dense(w) * x).sum(), steps=2)(LAYOUTS[layout](), torch.ones(2, 2))
