"""Weight gradients added straight into the buffer: what is fused, what is left alone, and that both are exact."""

import gc

import optree
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import gradacc
from gradacc._engines import fused
from tests.helpers import assert_trees_close, living_tensors


@pytest.fixture(autouse=True)
def products(monkeypatch) -> list[str]:
    """Small parameters are fused too; the nodes that added by themselves, in their order."""
    nodes: list[str] = []
    install = fused.install

    def watched(*args):
        edges, added = install(*args)
        nodes.extend(type(edge.node).__name__ for edge in edges)
        return edges, added

    monkeypatch.setattr(fused, "_SMALLEST", 1)
    monkeypatch.setattr(fused, "install", watched)
    return nodes


def doubles(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


def assert_exact(loss, params, batch, **options):
    grads, value = gradacc.accumulate_and_value(loss, steps=3, **options)(params, batch)
    assert_trees_close((grads, value), torch.func.grad_and_value(loss)(params, batch))


def squared(y: Tensor) -> Tensor:
    return y.abs().square().flatten(1).sum(1).mean()


def tied(w, x):
    return squared(F.linear(F.linear(x, w).sin(), w))


def both_operands(w, x):
    return squared(x @ (w["a"] @ w["b"]))


def square_of_itself(w, x):
    return squared(x @ (w @ w))


def transposed_twice(w, x):
    transpose = w.t()
    return squared(x @ transpose) + squared(x.cos() @ transpose)


def left_operand(w, x):
    return squared((w @ x.t()).t())


def scaled(w, x):
    return squared(torch.addmm(torch.zeros(4, dtype=x.dtype), x, w, alpha=2))


def embedded(w, x):
    return squared(F.linear(F.embedding((x[..., 0] > 0).long(), w), w))


LOSSES = [  # loss, shapes of the parameters, nodes that add by themselves in one micro-batch
    (lambda w, x: squared(F.linear(x, w)), (4, 4), ["MmBackward0"]),
    (lambda w, x: squared(F.linear(x, w["w"], w["b"])), {"w": (3, 4), "b": (3,)}, ["AddmmBackward0"]),
    (lambda w, x: squared(F.linear(x.unsqueeze(1).expand(-1, 2, -1), w)), (4, 4), ["MmBackward0"]),
    (lambda w, x: squared(x @ w), (4, 3), ["MmBackward0"]),
    (lambda w, x: squared(x @ w.T), (3, 4), ["MmBackward0"]),
    (lambda w, x: squared(x @ w.mT), (3, 4), ["MmBackward0"]),
    (lambda w, x: squared(x @ w.transpose(-1, 0)), (3, 4), ["MmBackward0"]),
    (lambda w, x: squared(x @ w.permute(-1, 0)), (3, 4), ["MmBackward0"]),
    (lambda w, x: squared(torch.stack([x, x]).transpose(0, 1) @ w), (4, 3), ["MmBackward0"]),
    (left_operand, (5, 4), ["MmBackward0"]),
    (tied, (4, 4), ["MmBackward0"] * 2),
    (both_operands, {"a": (4, 5), "b": (5, 4)}, ["MmBackward0"] * 2),
    (square_of_itself, (4, 4), ["MmBackward0"] * 2),
    (lambda w, x: squared(torch.addmm(w["b"], x, w["w"])), {"w": (4, 3), "b": (3,)}, ["AddmmBackward0"]),
    (embedded, (6, 4), ["EmbeddingBackward0", "MmBackward0"]),
    # left to autograd, all uses of a parameter or none
    (transposed_twice, (4, 4), []),
    (scaled, (4, 4), []),
    (lambda w, x: squared(F.linear(x, w) + w.sum()), (4, 4), []),
    (lambda w, x: squared(F.linear(x, w * 2)), (4, 4), []),
    (lambda w, x: squared(x @ w.permute(0, 1)), (4, 3), []),
    (lambda w, x: squared(x @ w.transpose(0, -2)), (4, 3), []),
    (lambda w, x: squared(F.linear(x, w.view(4, 4))), (2, 8), []),
    (lambda w, x: squared(torch.func.vmap(lambda row: F.linear(row, w).cos())(x)), (4, 4), ["MmBackward0"]),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize(("loss", "shapes", "nodes"), LOSSES)
def test_exact_whatever_is_fused(products, loss, shapes, nodes, dtype):
    if dtype.is_complex and loss is embedded:
        pytest.skip("an index from a sign")
    params = (
        {name: doubles(*shape, dtype=dtype) for name, shape in shapes.items()} if isinstance(shapes, dict) else None
    )
    assert_exact(loss, params or doubles(*shapes, dtype=dtype), doubles(7, 4, dtype=dtype))
    assert sorted(products) == sorted(nodes * 2)  # the first of three micro-batches is handed over


@pytest.mark.parametrize("shape", [(3, 4), (6, 4)])
def test_parameters_that_are_not_contiguous(products, shape):
    for param in (doubles(*shape[::-1]).t(), doubles(shape[0], 8)[:, ::2], doubles(1, 4).expand(shape)):
        assert_exact(lambda w, x: squared(F.linear(x, w)), param, doubles(5, 4))
    assert products == ["MmBackward0"] * 6


@pytest.mark.parametrize(
    ("options", "adds"), [({}, 2), ({"padding_idx": 2}, 2), ({"sparse": True}, 2), ({"scale_grad_by_freq": True}, 0)]
)
def test_embeddings(products, options, adds):
    def loss(w, tokens):
        return squared(F.embedding(tokens, w, **options))

    w, tokens = doubles(5, 4), torch.tensor([[0, 2, 2], [2, 2, 2], [4, 1, 0]])  # no count differs between the splits
    dense = {name: value for name, value in options.items() if name != "sparse"}
    if options == {"scale_grad_by_freq": True}:
        tokens = torch.tensor([[0, 1], [2, 3], [4, 4]])
    expected = torch.func.grad(lambda w, tokens: squared(F.embedding(tokens, w, **dense)))(w, tokens)
    assert_trees_close(gradacc.accumulate(loss, steps=3)(w, tokens), expected)
    assert products == ["EmbeddingBackward0"] * adds


def test_small_parameters_are_left_to_autograd(products, monkeypatch):
    monkeypatch.setattr(fused, "_SMALLEST", 1 << 14)
    assert_exact(lambda w, x: squared(F.linear(x, w)), doubles(127, 128), doubles(7, 128))
    assert not products


def test_hooks_see_the_gradient(products):
    """On a parameter: before or after its use, its own gradient; on activations, and on the graph's nodes."""

    def hooked(early, late):
        def loss(params, x):
            seen = []
            if early is not None:
                params["w"].register_hook(early)
            y = F.linear(x, params["w"])
            y.register_hook(lambda grad: grad * 3)
            z = F.linear(y, params["v"])
            z.grad_fn.register_prehook(lambda grads: (grads[0] * 5, *grads[1:]))
            if late is not None:
                params["v"].register_post_accumulate_grad_hook(late)
            return squared(z), seen

        return loss

    params, x = {"w": doubles(4, 4), "v": doubles(4, 4)}, doubles(6, 4)

    def by_hand(params, x):
        with torch.no_grad():
            y = x @ params["w"].t()
            dz = 2 * (y @ params["v"].t()) / len(x)
        return {"w": 2 * 3 * 5 * (dz @ params["v"]).t() @ x, "v": 5 * dz.t() @ y}

    expected = by_hand(params, x)
    seen = []
    grads, _ = gradacc.accumulate(hooked(lambda grad: grad * 2, None), steps=3, has_aux=True)(params, x)
    assert_trees_close(grads, expected)
    expected["w"] /= 2
    grads, _ = gradacc.accumulate(hooked(None, lambda leaf: seen.append(leaf.shape)), steps=3, has_aux=True)(params, x)
    assert_trees_close(grads, expected)
    assert len(seen) == 3
    # Where there are hooks nothing is fused.
    assert products == []


MASK = torch.arange(16.0, dtype=torch.float64).view(4, 4).sin()


def on_the_transpose(w, x):
    transpose = w.t()
    transpose.register_hook(lambda grad: grad * MASK)
    return squared(x @ transpose)


def on_the_product(w, x):
    y = x @ w
    y.grad_fn.register_hook(lambda grads, _: tuple(None if grad is None else grad * 3 for grad in grads))
    return squared(y)


def on_the_leafs_node(w, x):
    w.view_as(w).grad_fn.next_functions[0][0].register_prehook(lambda grads: (grads[0] * MASK,))
    return squared(x @ w)


def on_the_module(w, x):
    module = nn.Linear(4, 4, bias=False).double()
    module.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * MASK[0],))
    return squared(
        torch.func.functional_call(
            module, {"weight": w}, (torch.func.functional_call(module, {"weight": w}, (x * w[0],)),)
        )
    )


@pytest.mark.parametrize("loss", [on_the_transpose, on_the_product, on_the_leafs_node, on_the_module])
def test_hooks_that_the_graph_does_not_show(products, loss):
    """The ``.backward()`` loop is the oracle."""
    w, x = doubles(4, 4), doubles(6, 4)
    leaf = w.clone().requires_grad_()
    for part in x.split(2):
        (loss(leaf, part) / 3).backward()
    for steps in (1, 3):
        got = gradacc.accumulate(loss, steps=steps)(w, x)
        torch.testing.assert_close(got, leaf.grad)
    assert products == []


class Inside(torch.autograd.Function):
    """Itself; calls something in its backward pass."""

    @staticmethod
    def forward(ctx, x, call):
        ctx.call = call
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        ctx.call(grad)
        return grad, None


def test_a_backward_pass_may_differentiate_the_loss_again(products):
    """A pass of its own, from the loss itself: not ours, so nothing is added."""

    def loss(w, x, hooked):
        y = F.linear(x, w)
        out = squared(y)
        if hooked:
            return Inside.apply(out, lambda _: torch.autograd.grad(out, y, retain_graph=True))
        return out

    w, x = doubles(4, 4), doubles(6, 4)
    assert_trees_close(gradacc.accumulate(loss, steps=3)(w, x, True), gradacc.accumulate(loss, steps=3)(w, x, False))
    assert products == ["MmBackward0"] * 4


@pytest.mark.parametrize("held", [True, False])
def test_saved_tensor_hooks_unpack_once(products, held):
    """Checkpointing and offloading: what they hold is unpacked by autograd alone, once."""
    unpacked = []

    def loss(w, x):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: unpacked.append(1) or t):
            y = F.linear(x, w["a"]) if held else x @ w["a"].sin()
        return squared(checkpoint(F.linear, y.cos(), w["b"], use_reentrant=False))

    assert_trees_close(
        gradacc.accumulate(loss, steps=3)({"a": (a := doubles(4, 4)), "b": (b := doubles(4, 4))}, x := doubles(6, 4)),
        torch.func.grad(lambda w, x: squared(F.linear((x @ (w["a"].t() if held else w["a"].sin())).cos(), w["b"])))(
            {"a": a, "b": b}, x
        ),
    )
    assert products == []
    assert len(unpacked) == (3 if held else 6)


def test_autocast_is_left_alone(products):
    def loss(w, x):
        with torch.autocast("cpu", torch.bfloat16):
            return squared(F.linear(x, w).float())

    w, x = torch.randn(4, 4), torch.randn(6, 4)
    assert_trees_close(gradacc.accumulate(loss, steps=3)(w, x), torch.func.grad(loss)(w, x), rtol=2e-2, atol=2e-2)
    assert products == []


def test_operands_that_change_are_an_error(products):
    """As autograd's own: the operand was modified after it was saved."""

    def loss(w, x):
        y = F.linear(x, w["a"])
        z = F.linear(y, w["b"])
        y.add_(1)
        return squared(z)

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradacc.accumulate(loss, steps=2)({"a": doubles(4, 4), "b": doubles(4, 4)}, doubles(6, 4))


def test_no_reference_outlives_the_call():
    params, x = {i: doubles(4, 4) for i in range(4)}, doubles(6, 4)

    def loss(params, x):
        for param in params.values():
            x = F.linear(x, param)
        return squared(x)

    grad_fn = gradacc.accumulate(loss, steps=3)
    grad_fn(params, x)
    gc.collect()
    gc.disable()
    try:
        before = living_tensors()
        grad_fn(params, x)
        assert not living_tensors().keys() - before.keys()
    finally:
        gc.enable()


def test_a_layer_that_gets_no_gradient(products):
    """A product that the backward pass does not reach, or reaches with nothing."""

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    def loss(w, x):
        return squared(F.linear(x, w["a"])) + Nothing.apply(F.linear(x, w["b"])).sum() * 0

    grads = gradacc.accumulate(loss, steps=3)({"a": doubles(4, 4), "b": doubles(4, 4)}, doubles(6, 4))
    assert grads["b"].eq(0).all()
    assert grads["a"].ne(0).any()


def test_only_parameters_that_are_leaves_of_the_graph(products):
    """A Function's node is its ctx, which may hold a parameter under any name."""

    class Triple(torch.autograd.Function):
        @staticmethod
        def forward(ctx, w):
            ctx.variable = w
            return w.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * 3

    w, x = doubles(4, 4), doubles(6, 4)
    grads = gradacc.accumulate(lambda w, x: squared(x @ Triple.apply(w)), steps=3)(w, x)
    assert_trees_close(grads, 3 * torch.func.grad(lambda w, x: squared(x @ w))(w, x))
    assert products == []


def test_a_backward_pass_inside_another(products):
    """As implicit differentiation does: a node runs backward through the same nodes, with vectors of its own."""

    def loss(w, x):
        y = F.linear(x, w["a"])
        z = torch.tanh(F.linear(y, w["b"]))

        def call(grad):
            for _ in range(2):
                torch.autograd.grad(z, y, grad, retain_graph=True)

        return squared(Inside.apply(z, call))

    params, x = {"a": doubles(4, 4), "b": doubles(4, 4)}, doubles(6, 4)
    expected = torch.func.grad(lambda w, x: squared(torch.tanh(F.linear(F.linear(x, w["a"]), w["b"]))))(params, x)
    assert_trees_close(gradacc.accumulate(loss, steps=3)(params, x), expected)
    assert products == ["MmBackward0"] * 4


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state:UserWarning")  # torch's own
def test_sparse_and_nested_operands(products):
    w, x = doubles(4, 4), doubles(6, 4)
    assert_trees_close(
        gradacc.accumulate(lambda w, x: squared(torch.mm(w, x.t().to_sparse()).t()), steps=3)(w, x),
        torch.func.grad(lambda w, x: squared((w @ x.t()).t()))(w, x),
    )
    tokens = torch.tensor([[0, 1, 2], [2, 2, 3], [1, 0, 0]])
    offsets = torch.tensor([0, 1, 3])

    def nested(w, tokens):
        jagged = torch.nested.nested_tensor_from_jagged(tokens.flatten(), offsets)
        return F.embedding(jagged, w).values().square().sum()

    assert_trees_close(
        gradacc.accumulate(nested, steps=3, reduction="sum")(w, tokens),
        torch.func.grad(lambda w, tokens: F.embedding(tokens, w).square().sum())(w, tokens),
    )
    assert products == []


def test_a_sparse_gradient_that_arrives(products):
    def loss(w, x):
        return squared(torch.gather(x @ w, 1, (x > 0).long(), sparse_grad=True))

    w, x = doubles(4, 4), doubles(6, 4)
    expected = torch.func.grad(lambda w, x: squared(torch.gather(x @ w, 1, (x > 0).long())))(w, x)
    assert_trees_close(gradacc.accumulate(loss, steps=3)(w, x), expected)
    assert products == ["MmBackward0"] * 2


def test_anomaly_mode_sees_every_gradient(products):
    w, x = doubles(4, 4), doubles(6, 4)
    x[5] = torch.nan
    with torch.autograd.set_detect_anomaly(True, check_nan=True), pytest.raises(RuntimeError, match="returned nan"):
        gradacc.accumulate(lambda w, x: squared((x @ w).nan_to_num()), steps=3)(w, x)
    assert products == []


def loop(loss, params, batch):
    """The hand-written one."""
    leaves, treedef = optree.tree_flatten(params)
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    for part in batch.tensor_split(3):
        loss(optree.tree_unflatten(treedef, leaves), part).backward()


def flops(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize(("loss", "shapes", "nodes"), LOSSES)
def test_flops_are_those_of_the_hand_written_loop(products, loss, shapes, nodes):
    """Exactly: tied, transposed and embedded parameters, too."""
    params = {name: doubles(*shape) for name, shape in shapes.items()} if isinstance(shapes, dict) else doubles(*shapes)
    x = doubles(7, 4)
    counted = flops(lambda: gradacc.accumulate(loss, steps=3)(params, x))
    assert counted == flops(lambda: loop(loss, params, x)) > 0
    assert sorted(products) == sorted(nodes * 2)


def test_flops_of_each_module_are_those_of_the_hand_written_loop(products):
    """By hooks, where nothing is fused."""

    def by_module(run):
        with FlopCounterMode(display=False) as counter:
            run()
        return {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}

    module = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    apply, params, _ = gradacc.functional(module)
    tokens = torch.arange(14).view(7, 2) % 5
    ours = by_module(lambda: gradacc.accumulate(lambda p, x: squared(apply(p, x)), steps=3)(params, tokens))
    theirs = by_module(lambda: [squared(module(part)).backward() for part in tokens.tensor_split(3)])
    assert ours == theirs
    assert products == []


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events:UserWarning")  # one cycle is what is wanted
def test_the_profilers_flops_are_those_of_the_hand_written_loop(products):
    """Of matrix products: it counts elementwise ones too, and there are fewer additions here."""

    def products_of(run):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], with_flops=True) as profile:
            run()
        return sum(event.flops for event in profile.events() if event.name in ("aten::mm", "aten::addmm"))

    w, x = doubles(4, 4), doubles(7, 4)
    counted = products_of(lambda: gradacc.accumulate(tied, steps=3)(w, x))
    assert counted == products_of(lambda: loop(tied, w, x)) > 0
    assert products == ["MmBackward0"] * 4


def test_a_dispatch_mode_sees_the_additions(products):
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    names: list[str] = []
    with Seen():
        gradacc.accumulate(tied, steps=3)(doubles(4, 4), doubles(7, 4))
    assert names.count("aten.addmm.out") == len(products) == 4
