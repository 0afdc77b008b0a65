"""A gradient inside a loss: with `torch.func.grad` it compiles, in the other ways it is an error that says so."""

import pytest
import torch
from torch._dynamo.exc import TorchRuntimeError, Unsupported
from torch._dynamo.variables import higher_order_ops

import gradacc
from gradacc._engines.compiled import explain
from tests.helpers import assert_trees_close, some_slow

D = torch.float64
W = torch.linspace(-1, 1, 6, dtype=D).view(3, 2)
X = torch.linspace(-2, 3, 36, dtype=D).view(12, 3).sin()


def penalty(slopes):
    """Of slopes, a row an example: how far their norms are from 1."""
    return (slopes.norm(dim=1) - 1).square().mean()


def energy(w, x):
    return torch.tanh(x @ w).sum()


def with_func(w, x):
    return penalty(torch.func.grad(energy, argnums=1)(w, x))


def with_autograd(w, x):
    x = x.detach().clone().requires_grad_()
    return penalty(torch.autograd.grad(energy(w, x), x, create_graph=True)[0])


def by_the_parameters(w, x):
    """There is nothing that would have to require grad first."""
    return torch.autograd.grad(energy(w, x), w, create_graph=True)[0].square().sum() / len(x)


def with_backward(w, x):
    x = x.detach().clone().requires_grad_()
    energy(w, x).backward(inputs=[x], create_graph=True)
    return penalty(x.grad)


def on_the_micro_batch(w, x):
    x.requires_grad_()
    return energy(w, x) / len(x)


def backward_alone(w, x):
    energy(w, x).backward()
    return energy(w, x) / len(x)


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True:UserWarning")  # torch, of a cycle
@pytest.mark.parametrize("loss", [with_func, with_autograd, with_backward])
@pytest.mark.parametrize("options", [{"steps": 3}, {"microbatch_size": 5}])
def test_an_eager_gradient_penalty_is_the_large_batch_s(loss, options):
    actual = gradacc.accumulate_and_value(loss, **options)(W, X)
    assert_trees_close(actual, torch.func.grad_and_value(with_func)(W, X))
    assert not X.requires_grad
    assert X.grad is None


def test_an_eager_gradient_by_the_parameters_in_a_loss():
    """It is the loss's own result, not one that is added to the parameters' gradient."""

    def same(w, x):
        return torch.func.grad(energy)(w, x).square().sum() / len(x)

    actual = gradacc.accumulate_and_value(by_the_parameters)(W, [X])
    assert_trees_close(actual, torch.func.grad_and_value(same)(W, X))


@pytest.mark.parametrize(
    ("steps", "backend"), some_slow([(3, "aot_eager"), (6, "aot_eager"), (6, "eager")], (6, "eager"))
)
def test_compiled_with_torch_func(steps, backend):
    torch._dynamo.reset()
    compiled = torch.compile(gradacc.accumulate_and_value(with_func, steps=steps), fullgraph=True, backend=backend)
    assert_trees_close(compiled(W, X), torch.func.grad_and_value(with_func)(W, X))


CALLS = {
    with_autograd: (".requires_grad_()", TorchRuntimeError),
    by_the_parameters: ("torch.autograd.grad", Unsupported),
    with_backward: (".requires_grad_()", TorchRuntimeError),
    on_the_micro_batch: (".requires_grad_()", TorchRuntimeError),
    backward_alone: (".backward()", Unsupported),
}


@pytest.mark.parametrize("loss", CALLS)
def test_compiled_it_is_an_error_that_names_torch_func_grad(loss):
    torch._dynamo.reset()
    call, error = CALLS[loss]
    compiled = torch.compile(gradacc.accumulate(loss, steps=3), fullgraph=True, backend="eager")
    with pytest.raises(error, match=r"^accumulate: the loss calls .*torch\.func\.grad\(energy\)\(x\)") as caught:
        compiled(W, X)
    assert str(caught.value).startswith(f"accumulate: the loss calls {call}, which")
    assert not X.requires_grad


def test_of_a_list_the_same_and_nothing_is_left_on_it():
    torch._dynamo.reset()
    window = [X[:5].clone(), X[5:].clone()]
    compiled = torch.compile(gradacc.accumulate(on_the_micro_batch), fullgraph=True, backend="eager")
    with pytest.raises(Unsupported, match=r"^accumulate: the loss calls \.requires_grad_\(\)"):
        compiled(W, window)
    assert not any(x.requires_grad for x in window)


def test_the_streaming_form_says_it_too():
    torch._dynamo.reset()
    init, update, _, _ = gradacc.accumulator(with_autograd)
    with pytest.raises(TorchRuntimeError, match=r"^accumulator: the loss calls .*torch\.func\.grad"):
        torch.compile(update, fullgraph=True, backend="eager")(init(W), W, X)


def unknown():
    return False


def test_an_error_about_something_else_is_torch_s(monkeypatch):
    """And where this version of Dynamo knows no such operator."""

    def loss(w, x):
        print("called")
        return energy(w, x) / len(x)

    torch._dynamo.reset()
    with pytest.raises(Unsupported, match="^Failed to trace builtin operator"):
        torch.compile(gradacc.accumulate(loss, steps=3), fullgraph=True, backend="eager")(W, X)

    def wrong(w, x):
        return energy(w, x[:, :2])

    with pytest.raises(TorchRuntimeError, match="^RuntimeError when making fake tensor call"):
        torch.compile(gradacc.accumulate(wrong, steps=3), fullgraph=True, backend="eager")(W, X)
    monkeypatch.setattr(explain, "_register", unknown)
    torch._dynamo.reset()
    compiled = torch.compile(gradacc.accumulate(by_the_parameters, steps=3), fullgraph=True, backend="eager")
    with pytest.raises(Unsupported, match=r"^using `torch\.autograd\.grad`"):
        compiled(W, X)
    monkeypatch.undo()
    monkeypatch.delattr(higher_order_ops, "_hop_name_to_variable_class")
    assert explain._register() is False


def prints(w, x):
    print("called")
    return energy(w, x) / len(x)


@pytest.mark.parametrize("loss", some_slow([prints, by_the_parameters], prints))
def test_without_fullgraph_a_loss_that_breaks_the_graph_runs_as_it_is(loss):
    torch._dynamo.reset()
    grad_fn = gradacc.accumulate_and_value(loss, steps=6)
    assert_trees_close(torch.compile(grad_fn, backend="eager")(W, X), grad_fn(W, X))


@pytest.mark.parametrize("loss", [prints, by_the_parameters])
def test_without_fullgraph_the_streaming_form_does_too(loss):
    torch._dynamo.reset()
    init, update, _, finalize = gradacc.accumulator(loss)
    compiled = torch.compile(update, backend="eager")
    state, expected = init(W), init(W)
    for x in X.split(5):
        state, expected = compiled(state, W, x), update(expected, W, x)
    assert_trees_close(finalize(state), finalize(expected))
