"""Trajectories: five steps of a functional optimizer and of torch's own, on the same gradients."""

import optree
import torch

from gradacc import optim

NAMESPACE = "gradacc"
STEPS = 5


def leaves_of(tree):
    return optree.tree_leaves(tree, namespace=NAMESPACE)


def parameters(dtype=torch.float32):
    """A matrix, a vector and a number in a nested tree, an empty one, and a column-major one."""
    return {
        "w": torch.randn(3, 5, dtype=dtype),
        "deep": [torch.randn(5, dtype=dtype), (torch.randn((), dtype=dtype), torch.randn(0, 2, dtype=dtype))],
        "t": torch.randn(4, 3, dtype=dtype).t(),
    }


def matrices(dtype=torch.float32):
    return {"a": torch.randn(3, 4, dtype=dtype), "b": [torch.randn(4, 2, dtype=dtype)]}


def gradients(params):
    return optree.tree_map(torch.randn_like, params, namespace=NAMESPACE)


def imperative(cls, params, many, **options):
    """The parameters after each step of torch's own, on gradients in the order of the leaves."""
    leaves = [leaf.clone() for leaf in leaves_of(params)]
    optimizer = cls(leaves, **options)
    return list(_steps(optimizer, leaves, many))


def _steps(optimizer, leaves, many):
    for grads in many:
        for leaf, grad in zip(leaves, leaves_of(grads), strict=True):
            leaf.grad = grad.clone()
        optimizer.step()
        yield [leaf.clone() for leaf in leaves]


def trajectory(step, params, many, state, *, copied=False):
    """The parameters after each step, as lists of leaves, and the last state. ``copied`` ones may be donated."""
    out = []
    for grads in many:
        if copied:
            grads = optree.tree_map(torch.clone, grads, namespace=NAMESPACE)
            if not out:
                params = optree.tree_map(torch.clone, params, namespace=NAMESPACE)
        params, state = step(params, grads, state)
        out.append([leaf.clone() for leaf in leaves_of(params)])
    return out, state


def assert_same(actual, expected, *, rtol=0.0, atol=0.0):
    assert len(actual) == len(expected)
    for mine, theirs in zip(actual, expected, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def compiled(func):
    torch.compiler.reset()  # Dynamo counts recompilations per code object, which all our optimizers share
    return torch.compile(func, backend="aot_eager", fullgraph=True)


OURS = {
    "sgd": (optim.sgd, torch.optim.SGD, dict(lr=0.1)),
    "sgd decayed": (optim.sgd, torch.optim.SGD, dict(lr=0.1, weight_decay=0.1)),
    "momentum": (optim.sgd, torch.optim.SGD, dict(lr=0.1, momentum=0.9, weight_decay=0.1)),
    "dampened": (optim.sgd, torch.optim.SGD, dict(lr=0.1, momentum=0.9, dampening=0.5)),
    "nesterov": (optim.sgd, torch.optim.SGD, dict(lr=0.1, momentum=0.9, nesterov=True)),
    "nesterov decayed": (
        optim.sgd,
        torch.optim.SGD,
        dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    ),
    "adam": (optim.adam, torch.optim.Adam, dict(lr=0.1)),
    "adam decayed": (optim.adam, torch.optim.Adam, dict(lr=0.1, weight_decay=0.1, betas=(0.8, 0.99))),
    "amsgrad": (optim.adam, torch.optim.Adam, dict(lr=0.1, amsgrad=True, eps=1e-3)),
    "adamw": (optim.adamw, torch.optim.AdamW, dict(lr=0.1)),
    "adamw amsgrad": (optim.adamw, torch.optim.AdamW, dict(lr=0.1, weight_decay=0.3, amsgrad=True)),
}

TORCH = {
    "SGD": dict(lr=0.1),
    "SGD momentum": dict(lr=0.1, momentum=0.9, dampening=0.5, weight_decay=0.1),
    "SGD nesterov foreach": dict(lr=0.1, momentum=0.9, nesterov=True, foreach=True),
    "SGD fused": dict(lr=0.1, momentum=0.9, fused=True),
    "Adam": dict(lr=0.1),
    "Adam foreach": dict(lr=0.1, amsgrad=True, foreach=True),
    "Adam fused": dict(lr=0.1, fused=True),
    "AdamW": dict(lr=torch.tensor(0.1)),
    "AdamW foreach": dict(lr=0.1, foreach=True, maximize=True),
    "AdamW fused": dict(lr=0.1, fused=True),
    "Adamax": dict(weight_decay=0.1),
    "Adamax foreach": dict(foreach=True),
    "NAdam": dict(weight_decay=0.1, decoupled_weight_decay=True),
    "NAdam foreach": dict(foreach=True),
    "RAdam": dict(),
    "RAdam foreach": dict(foreach=True),
    "RMSprop": dict(momentum=0.9, centered=True),
    "RMSprop foreach": dict(foreach=True),
    "Rprop": dict(),
    "Rprop foreach": dict(foreach=True),
    "Adagrad": dict(lr=0.1, initial_accumulator_value=0.5),
    "Adagrad foreach": dict(foreach=True, lr_decay=0.1),
    "Adagrad fused": dict(fused=True),
    "Adadelta": dict(),
    "Adadelta foreach": dict(foreach=True),
    "ASGD": dict(t0=2),
    "ASGD foreach": dict(foreach=True),
    "Adafactor": dict(),
    "Adafactor foreach": dict(foreach=True),
    "Muon": dict(lr=0.1),
}


def torch_case(name):
    """The class, its options, and parameters that it takes."""
    cls = getattr(torch.optim, name.split()[0])
    if cls is torch.optim.Muon:
        return cls, TORCH[name], matrices()
    params = parameters()
    if "fused" in name or cls is torch.optim.Adafactor:
        params["deep"] = params["deep"][0]  # no empty tensor
    return cls, TORCH[name], params
