"""from_torch: torch's own trajectories to the last bit, through saved states; and what it cannot take."""

import io
import math
from unittest import mock

import optree
import pytest
import torch

from gradacc import optim
from gradacc.optim import _take_step
from tests.helpers import assert_trees_equal, fingerprint
from tests.optim.cases import (
    NAMESPACE,
    TORCH,
    assert_same,
    gradients,
    imperative,
    leaves_of,
    parameters,
    torch_case,
    trajectory,
)


def _saved(state):
    """Through a file, flat."""
    leaves, treedef = optree.tree_flatten(state, namespace=NAMESPACE)
    file = io.BytesIO()
    torch.save(leaves, file)
    file.seek(0)
    return optree.tree_unflatten(treedef, torch.load(file))


@pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])
@pytest.mark.parametrize("name", TORCH)
def test_trajectories_are_the_originals_to_the_last_bit(name, donate):
    cls, options, params = torch_case(name)
    many = [gradients(params) for _ in range(6)]
    optimizer = optim.from_torch(cls, **options)
    begin = optimizer.init(params)

    def step(params, grads, state):
        before = fingerprint((params, grads, state))
        moved, new = optimizer.step(params, grads, _saved(state) if donate else state, donate=donate)
        assert all(leaf.grad is None and not leaf.requires_grad for leaf in leaves_of((moved, new)))
        if not donate:
            assert fingerprint((params, grads, state)) == before
            old = {leaf.data_ptr() for leaf in leaves_of((params, grads, state)) if leaf.numel()}
            assert not old & {leaf.data_ptr() for leaf in leaves_of((moved, new)) if leaf.numel()}
        return moved, new

    out, state = trajectory(step, params, many, begin, copied=True)
    assert_same(out, imperative(cls, params, many, **options))
    assert optree.tree_structure(state, namespace=NAMESPACE) == optree.tree_structure(begin, namespace=NAMESPACE)
    assert all(isinstance(leaf, torch.Tensor) for leaf in leaves_of(state))


@pytest.mark.parametrize("name", [name for name in TORCH if "foreach" in name])
def test_a_foreach_step_in_parts_is_the_whole_to_the_last_bit(name):
    """A part holds one or two of these parameters; torch's own step takes all at once."""
    cls, options, params = torch_case(name)
    many = [gradients(params) for _ in range(4)]
    optimizer = optim.from_torch(cls, **options)
    with mock.patch.object(_take_step, "_PART", 8):
        out, _ = trajectory(optimizer.step, params, many, optimizer.init(params))
    assert_same(out, imperative(cls, params, many, **options))


@pytest.mark.parametrize("name", ["SGD momentum", "Adam foreach", "AdamW fused", "RMSprop"])
def test_a_donated_step_is_made_in_the_memory_given(name):
    cls, options, params = torch_case(name)
    optimizer = optim.from_torch(cls, **options)
    params, state = optimizer.step(params, gradients(params), optimizer.init(params))
    held = [leaf.data_ptr() for leaf in leaves_of((params, state.slots))]
    params, state = optimizer.step(params, gradients(params), state, donate=True)
    assert [leaf.data_ptr() for leaf in leaves_of((params, state.slots))] == held


def test_lr_may_be_a_function_of_the_step():
    params = parameters()
    many = [gradients(params) for _ in range(4)]
    leaves = [leaf.clone() for leaf in leaves_of(params)]
    theirs = torch.optim.AdamW(leaves, lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(theirs, gamma=0.5)
    optimizer = optim.from_torch(
        torch.optim.AdamW, lr=optim.schedule(torch.optim.lr_scheduler.ExponentialLR, 0.1, gamma=0.5)
    )
    out, _ = trajectory(optimizer.step, params, many, optimizer.init(params))
    for mine, grads in zip(out, many, strict=True):
        for leaf, grad in zip(leaves, leaves_of(grads), strict=True):
            leaf.grad = grad
        theirs.step()
        schedule.step()
        assert_same([mine], [leaves])


class Odd(torch.optim.Optimizer):
    """Keeps numbers, None, and whatever else it is told to."""

    def __init__(self, params, lr=0.1, extra=None):
        super().__init__(params, {"lr": lr, "extra": extra})

    def step(self, closure=None):
        for param in self.param_groups[0]["params"]:
            state = self.state[param]
            if not state:
                state.update(count=0, decay=1.0, odd=False, nothing=None, extra=self.param_groups[0]["extra"])
            assert [type(state[key]) for key in ("count", "decay", "odd")] == [int, float, bool]
            assert state["nothing"] is None
            state.update(count=state["count"] + 1, decay=state["decay"] * math.pi / 3, odd=not state["odd"])
            with torch.no_grad():
                param.sub_(param.grad, alpha=state["decay"] * state["count"] * (1 + state["odd"]))


class InGroups(torch.optim.SGD):
    """Keeps a number in its group."""

    def step(self, closure=None):
        self.param_groups[0]["k"] = self.param_groups[0].get("k", 0) + 1


class Keeping(torch.optim.Optimizer):
    """Keeps something where ``keep`` puts it, in every step."""

    def __init__(self, params, keep):
        super().__init__(params, {"lr": 0.1})
        self.keep, self.number, self.buffer, self.many = keep, 0, torch.zeros(3), {"deep": [[]]}

    @torch.no_grad()
    def step(self, closure=None):
        self.keep(self)


class NeedsClosure(torch.optim.SGD):
    def step(self, closure):
        return closure()


class AssertsClosure(torch.optim.SGD):
    def step(self, closure=None):
        assert closure is not None


def _put(name, value):
    return lambda made: setattr(made, name, value(made))


ELSEWHERE = {
    "number": (_put("number", lambda made: made.number + 1), "number"),
    "new attribute": (_put("momentum", lambda made: torch.zeros(1)), "momentum"),
    "in place": (lambda made: made.buffer.add_(1), "buffer"),
    "in a container": (lambda made: made.many["deep"][0].append(1), r"many\['deep'\]\[0\]"),
    "under a name": (lambda made: made.state["n"].update(count=1), r"state\['n'\]"),
}


@pytest.mark.parametrize(("keep", "path"), ELSEWHERE.values(), ids=ELSEWHERE)
def test_state_that_is_kept_elsewhere_is_refused(keep, path):
    with pytest.raises(TypeError, match=f"Keeping keeps state elsewhere than under a parameter in its state.*{path}"):
        optim.from_torch(Keeping, keep=keep).init(parameters())


def test_a_class_that_keeps_nothing_elsewhere_is_taken():
    class Fused(torch.optim.AdamW):
        """Torch sets an attribute of its own in the first step of a fused one."""

    params = {"w": torch.ones(3)}
    optimizer = optim.from_torch(Fused, lr=0.1, fused=True)
    optimizer.step(params, {"w": torch.ones(3)}, optimizer.init(params))


FUSED = {
    "gaps": lambda: (torch.arange(40.0)[:20:2], torch.arange(10.0)),
    "gradient with gaps": lambda: (torch.arange(10.0), torch.arange(20.0)[::2]),
    "transposed": lambda: (torch.arange(24.0).view(6, 4).t(), torch.arange(24.0).view(4, 6)),
    "expanded gradient": lambda: (torch.arange(24.0).view(4, 6), torch.ones(4, 1).expand(4, 6)),
    "channels last": lambda: (
        torch.arange(48.0).view(2, 3, 2, 4).to(memory_format=torch.channels_last),
        torch.arange(48.0).view(2, 3, 2, 4).sin(),
    ),
}


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad])
@pytest.mark.parametrize("case", FUSED.values(), ids=FUSED)
def test_fused_kernels_where_strides_differ(cls, case, donate):
    """Torch's pair elements by their addresses. And what is between a parameter's elements was not given."""
    options = {"momentum": 0.9} if cls is torch.optim.SGD else {}
    got, (param, grad) = [], case()
    around = param.as_strided((param.untyped_storage().nbytes() // 4,), (1,))
    before, gaps = around.clone(), len(around) > param.numel()
    for fused in (False, True):
        optimizer = optim.from_torch(cls, lr=0.1, fused=fused, **options)
        params = {"w": param}
        state = optimizer.init(params)
        for _ in range(3):
            # As a checkpoint has them.
            slots = {key: entry.contiguous() for key, entry in state.slots["w"].items()}
            state = state._replace(slots={"w": slots})
            slope = torch.empty_strided(grad.shape, grad.stride()).copy_(grad) if 0 not in grad.stride() else grad
            params, state = optimizer.step(params, {"w": slope}, state, donate=donate and fused and slope is not grad)
        got.append(params["w"])
    torch.testing.assert_close(got[1], got[0])
    if gaps:
        assert torch.equal(around, before)


def test_numbers_in_a_state_are_tensors_and_get_their_types_back():
    params = parameters()
    many = [gradients(params) for _ in range(5)]
    optimizer = optim.from_torch(Odd)
    out, state = trajectory(optimizer.step, params, many, optimizer.init(params))
    assert_same(out, imperative(Odd, params, many))
    assert {key: leaf.dtype for key, leaf in state.slots["w"].items() if isinstance(leaf, torch.Tensor)} == {
        "count:int": torch.int64,
        "decay:float": torch.float64,
        "odd:bool": torch.bool,
    }


REFUSED = {
    "LBFGS": (torch.optim.LBFGS, {}, TypeError, "several times a step.*torch.optim.LBFGS itself works"),
    "SparseAdam": (torch.optim.SparseAdam, {}, TypeError, "SparseAdam takes sparse gradients only"),
    "no class": (torch.optim.Adam([torch.zeros(1)]), {}, TypeError, "pass torch.optim.Adam and its options"),
    "module": (torch.nn.Linear, {}, TypeError, "cls must be a class of torch.optim"),
    "differentiable": (torch.optim.Adam, {"differentiable": True}, ValueError, "differentiable=True"),
    "params": (torch.optim.Adam, {"params": []}, TypeError, "leave params= out"),
    "a closure": (NeedsClosure, {}, TypeError, "NeedsClosure.step needs a closure"),
    "a scheduler's class": (
        torch.optim.Adam,
        {"lr": torch.optim.lr_scheduler.StepLR},
        TypeError,
        r"lr must be a number.*gradacc.optim.schedule\(StepLR, lr",
    ),
    "negative lr": (torch.optim.Adam, {"lr": -1.0}, ValueError, "lr must be finite and not negative, got -1.0"),
    "NaN": (torch.optim.Adam, {"lr": math.nan}, ValueError, "lr must be finite and not negative, got nan"),
}


@pytest.mark.parametrize(("cls", "options", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_made_functional_is_refused(cls, options, error, message):
    with pytest.raises(error, match=message):
        optim.from_torch(cls, **options)


REFUSED_IN_INIT = {
    "its own words": (torch.optim.Adam, {"betas": (2.0, 0.9)}, ValueError, "Invalid beta parameter"),
    "unknown option": (torch.optim.Adam, {"beta": 1}, TypeError, "beta"),
    "vectors for Muon": (torch.optim.Muon, {}, ValueError, "2D"),
    "state in groups": (InGroups, {"lr": 0.1}, TypeError, r"InGroups keeps state in its param_groups \(k\)"),
    "a string": (Odd, {"extra": "x"}, TypeError, "Odd keeps 'extra' for a parameter, a str"),
}


@pytest.mark.parametrize(("cls", "options", "error", "message"), REFUSED_IN_INIT.values(), ids=REFUSED_IN_INIT)
def test_what_only_shows_in_a_step_is_refused_in_init(cls, options, error, message):
    with pytest.raises(error, match=message):
        optim.from_torch(cls, **options).init(parameters())


def test_what_a_step_raises_without_a_closure_says_so():
    with pytest.raises(AssertionError) as caught:
        optim.from_torch(AssertsClosure, lr=0.1).init(parameters())
    assert "AssertsClosure.step(), which is called without a closure" in caught.value.__notes__[0]


def test_no_transform():
    optimizer = optim.from_torch(torch.optim.SGD, lr=0.1)
    w = torch.ones(2, 3)
    with pytest.raises(ValueError, match="SGD reads values and writes in place"):
        torch.vmap(lambda w: optimizer.step(w, w, optimizer.init(w))[0])(w)


OTHERS = {
    "another optimizer": lambda params: optim.from_torch(torch.optim.SGD, lr=0.1, momentum=0.9).init(params),
    "other options": lambda params: optim.from_torch(torch.optim.Adam, lr=0.1, amsgrad=True).init(params),
    "fewer parameters": lambda params: optim.from_torch(torch.optim.Adam, lr=0.1).init({"w": params["w"]}),
    "other shapes": lambda params: optim.from_torch(torch.optim.Adam, lr=0.1).init(params | {"w": torch.ones(2, 5)}),
    "other dtypes": lambda params: optim.from_torch(torch.optim.Adam, lr=0.1).init(parameters(torch.float64)),
    "the same shapes under other names": lambda params: optim.from_torch(torch.optim.Adam, lr=0.1).init(
        {f"other {name}": leaf for name, leaf in params.items()}
    ),
    "another kind": lambda params: optim.adam(0.1).init(params),
}


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_another_state_is_refused_before_anything_changes(other, donate):
    params = parameters()
    grads = gradients(params)
    state = other(params)
    state = state._replace(step=torch.tensor(3))
    before = fingerprint((params, grads, state))
    with pytest.raises((TypeError, ValueError), match="from_torch: state.*(another|other)"):
        optim.from_torch(torch.optim.Adam, lr=0.1).step(params, grads, state, donate=donate)
    assert fingerprint((params, grads, state)) == before


def test_init_changes_nothing():
    params = parameters()
    before = fingerprint(params)
    state = optim.from_torch(torch.optim.Rprop).init(params)
    assert fingerprint(params) == before
    assert_trees_equal(state, optree.tree_map(torch.zeros_like, state, namespace=NAMESPACE))
