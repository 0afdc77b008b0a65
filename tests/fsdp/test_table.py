"""The table of ``docs/fsdp.md``: a row, a test."""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import gradacc
from gradacc import optim
from tests.fsdp import cases
from tests.helpers import assert_trees_close
from tests.workers import Failed

PAGE = (Path(__file__).parents[2] / "docs" / "fsdp.md").read_text()
ROWS = re.findall(r"^\| (?!what|---)(.+?) \| (works|error) \|", PAGE, re.MULTILINE)


def given(group):
    mesh, rank = cases.mesh_of(group), dist.get_rank(group)
    batch = cases.batch_of(rank, number=1)
    return mesh, cases.params_of(), cases.divide(mesh, cases.params_of()), batch, cases.union(2, number=1)


def check(grads, expected):
    for leaf in grads.values():
        assert isinstance(leaf, DTensor)
    assert_trees_close(cases.undivided(grads), expected)


def grad_fn_of(mesh, loss_fn=cases.loss_fn, **options):
    return gradacc.accumulate(loss_fn, **{"steps": 2, "sync": gradacc.reduce_scatter(mesh), **options})


def works(group, options, sync):
    """A call with these options is that of the large batch."""
    mesh, whole, params, batch, union = given(group)
    expected = torch.func.grad(lambda *args: cases.loss_fn(*args).value)(whole, union)
    grad_fn = grad_fn_of(mesh, sync=gradacc.reduce_scatter(mesh, **sync), **options)
    for _ in range(2):
        check(grad_fn(params, batch), expected)


def iterable(group):
    mesh, whole, params, batch, union = given(group)
    parts = [{key: leaf[i : i + 1] for key, leaf in batch.items()} for i in range(len(batch["x"]))]
    expected = torch.func.grad(lambda *args: cases.loss_fn(*args).value)(whole, union)
    check(grad_fn_of(mesh, steps=None)(params, parts), expected)


def several(params, batch):
    first = cases.loss_fn(params, batch)
    return first, gradacc.Mean(params["w"].square().sum() * first.weight, first.weight)


def means(group):
    mesh, whole, params, batch, union = given(group)
    expected = gradacc.accumulate(several, steps=1)(whole, union)
    check(grad_fn_of(mesh, several)(params, batch), expected)
    counted = grad_fn_of(mesh, several, weights=lambda batch: (batch["mask"].sum(), batch["mask"].sum()))
    check(counted(params, batch), expected)


def through(group):
    mesh, whole, params, batch, union = given(group)

    def encode(params, batch):
        return torch.tanh(batch["x"] @ params["w"].T)

    def loss_fn(params, outputs, batch):
        return (outputs @ outputs.T).square().mean() + (outputs @ params["b"][:5]).mean() + params["few"].sum()

    expected = gradacc.accumulate(loss_fn, steps=1, through=encode)(whole, union)
    grad_fn = grad_fn_of(mesh, loss_fn, through=encode)
    for _ in range(2):
        check(grad_fn(params, batch), expected)


def carry(group):
    mesh, whole, params, batch, union = given(group)

    def loss_fn(params, batch, carry):
        return cases.loss_fn(params, batch), gradacc.Mean(
            carry.total + batch["x"].sum(0), carry.weight + len(batch["x"])
        )

    begin = gradacc.Mean(torch.zeros(3, dtype=torch.float64), 0)
    expected, mean = gradacc.accumulate(loss_fn, steps=1, has_carry=True)(whole, union, carry=begin)
    grads, found = grad_fn_of(mesh, loss_fn, has_carry=True)(params, batch, carry=begin)
    check(grads, expected)
    assert_trees_close(found.value, mean.value)


def arguments(group):
    """Of several arguments, with whole leaves among them."""
    mesh, whole, params, batch, union = given(group)

    def loss_fn(params, more, batch):
        return cases.loss_fn({**params, **more}, batch)

    names = ("w", "b")
    one, other = ({k: v for k, v in params.items() if (k in names) == there} for there in (True, False))
    other["few"] = whole["few"]
    first, second = grad_fn_of(mesh, loss_fn, argnums=(0, 1))(one, other, batch)
    few = second.pop("few")
    assert isinstance(few, gradacc.Shard)
    expected = torch.func.grad(lambda *args: cases.loss_fn(*args).value)(whole, union)
    flat = expected.pop("few").reshape(-1)
    assert_trees_close(few.values, flat[few.offset : few.offset + few.length])
    check({**first, **second}, expected)


def dtypes(group):
    mesh, rank = cases.mesh_of(group), dist.get_rank(group)
    c = torch.randn(3, 2, dtype=torch.complex128)
    trees = {"c": c, "half": torch.randn(3, 2).bfloat16(), "t": torch.randn(2, 3, dtype=torch.float64).T}
    x = torch.randn(4, 2, dtype=torch.float64)

    def loss_fn(params, x):
        y = (x.to(c.dtype) @ params["c"].T).abs().square().mean() + (x @ params["t"].T).square().mean()
        return y + (x.bfloat16() @ params["half"].T).double().square().mean()

    expected = gradacc.accumulate(loss_fn, steps=2)(trees, x)
    grads = cases.undivided(grad_fn_of(mesh, loss_fn, steps=1)(cases.divide(mesh, trees), x.chunk(2)[rank]))
    # "half" is computed in bfloat16; what is not is compared below.
    assert_trees_close(grads, expected, rtol=1e-2, atol=1e-2)
    del grads["half"], expected["half"]
    assert_trees_close(grads, expected)


def accumulator(group, later):
    mesh, whole, params, batch, _ = given(group)
    streaming = gradacc.accumulator(cases.loss_fn, sync=gradacc.reduce_scatter(mesh))
    state = streaming.init(whole if later else params)
    streaming.update(state, params, batch)


def transformed(group, how):
    mesh, _, params, batch, _ = given(group)
    alone = gradacc.accumulate(cases.loss_fn, steps=2)
    if how == "grad":
        torch.func.grad(lambda params: alone(params, batch)["b"].sum())(params)
    elif how == "vmap":
        torch.vmap(lambda x: grad_fn_of(mesh)(params, {**batch, "x": x}))(batch["x"][None])
    elif how == "nested":
        x = batch["x"]
        gradacc.accumulate(lambda x, _: alone(params, {**batch, "x": x})["b"].sum(), steps=1)(x, x)
    else:
        torch.compile(grad_fn_of(mesh), backend="eager")(params, batch)


def connected(group):
    mesh, _, params, batch, _ = given(group)
    grads = grad_fn_of(mesh)({name: leaf.requires_grad_() for name, leaf in params.items()}, batch)
    grads["w"].to_local().sum().backward()


def microbatch(group):
    _, _, params, batch, _ = given(group)
    gradacc.microbatch(lambda x, w: x @ w.T, steps=2, in_dims=(0, None))(batch["x"], params["w"])


def compiled_loss(group):
    mesh, whole, params, batch, union = given(group)
    loss_fn = torch.compile(cases.loss_fn, backend="eager")
    expected = torch.func.grad(lambda *args: cases.loss_fn(*args).value)(whole, union)
    check(grad_fn_of(mesh, loss_fn)(params, batch), expected)


def placed(group, kind):
    mesh, whole, params, batch, _ = given(group)
    sync, w = gradacc.reduce_scatter(mesh), whole["w"]
    if kind == "sync=None":
        sync = None
    elif kind == "all_reduce":
        sync = gradacc.all_reduce(mesh)
    elif kind == "Replicate":
        params["w"] = DTensor.from_local(w, mesh, [Replicate()], run_check=False)
    elif kind == "Shard(1)":
        params["w"] = DTensor.from_local(w, mesh, [Shard(1)], run_check=False)
    elif kind == "Partial":
        params["w"] = DTensor.from_local(w, mesh, [Partial()], run_check=False)
    elif kind == "HSDP":
        wide = init_device_mesh("cpu", (2, 2))
        params["w"] = DTensor.from_local(w, wide, [Replicate(), Shard(0)], run_check=False)
    gradacc.accumulate(cases.loss_fn, steps=2, sync=sync)(params, batch)


def without_sharded(group, step):
    mesh, _, params, batch, _ = given(group)
    optimizer = optim.clip_by_global_norm(optim.adamw(0.1), 1.0)
    if not step:
        optimizer.init(params)
    grads = grad_fn_of(mesh)(params, batch)
    state = optim.sharded(optim.adamw(0.1), mesh).init(params)
    optimizer.step(params, grads, state)


def whole_needed(group):
    optim.sharded(optim.from_torch(torch.optim.Adafactor), cases.mesh_of(group))


UNKNOWN = r"TypeError: accumulate: params\['.*'\] is a DTensor of shape .* and placements .*"
OF_TORCH = r"\w*(Error|Unsupported)"
"""torch's own: looking for a DTensor inside of a functorch wrapper changes what Dynamo compiles later."""

NOT_HERE = r"TypeError: accumulate: params\['b'\] is a DTensor.*torch.func's transforms.*134462.*full_tensor"
TABLE = {
    "`steps=`, `microbatch_size=`": (works, ({}, {}), None),
    "an iterable of micro-batches": (iterable, (), None),
    "`overlap=True`": (works, ({}, {"overlap": True}), None),
    "`nonfinite=\"drop\"`": (works, ({"nonfinite": "drop"}, {}), None),
    "several means, `weights=`": (means, (), None),
    "`through=`": (through, (), None),
    "`has_carry=True`": (carry, (), None),
    "`argnums=(0, 1)`, whole leaves among DTensors": (arguments, (), None),
    "complex and bfloat16 parameters, transposed ones": (dtypes, (), None),
    "`torch.compile(loss_fn)`": (compiled_loss, (), None),
    "`gradacc.accumulator`": (accumulator, (False,), "TypeError: accumulator: params.*every update would have to gather"),
    "`sync=None`": (placed, ("sync=None",), UNKNOWN + r"sync=gradacc.reduce_scatter\(mesh\)"),
    "`sync=gradacc.all_reduce(mesh)`": (placed, ("all_reduce",), UNKNOWN + r"sync=gradacc.reduce_scatter\(mesh\)"),
    "`Replicate()`": (placed, ("Replicate",), UNKNOWN + r"whole on every rank. Pass to_local\(\)"),
    "`Shard(1)`": (placed, ("Shard(1)",), UNKNOWN + r"rows are supported, Shard\(0\)"),
    "`Partial()`": (placed, ("Partial",), UNKNOWN + r"Pass redistribute"),
    "a mesh of two dimensions (HSDP, tensor parallelism)": (placed, ("HSDP",), UNKNOWN + "mesh has 2 dimensions"),
    "`torch.func.grad` around a call": (transformed, ("grad",), OF_TORCH),
    "`torch.vmap` around a call": (transformed, ("vmap",), "NotImplementedError: .*inside a functorch transform"),
    "in the loss of another `grad_fn`": (transformed, ("nested",), NOT_HERE),
    "`torch.compile(grad_fn)`": (transformed, ("compile",), OF_TORCH),
    "a backward pass through the gradients": (connected, (), "RuntimeError: .*a backward pass has reached the results"),
    "`gradacc.microbatch`": (microbatch, (), "mixed torch.Tensor and DTensor"),
    "an optimizer without `sharded`": (
        without_sharded, (False,), r"TypeError: adamw: params\['b'\] is a DTensor.*gradacc.optim.sharded\(optimizer, mesh\)"
    ),
    "Muon, Adafactor": (whole_needed, (), "ValueError: sharded: the optimizer needs whole parameters"),
}  # fmt: skip


def test_the_page_has_these_rows():
    assert {row: kind for row, kind in ROWS if row in TABLE} == {
        row: "works" if message is None else "error" for row, (_, _, message) in TABLE.items()
    }
    assert {row for row, _ in ROWS} - set(TABLE) == {
        "`functional(module)`",
        "tied weights, activation checkpointing",
        "a module's own forward pass",
        "frozen parameters",
        "`MixedPrecisionPolicy`",
    }


@pytest.mark.parametrize("row", TABLE)
def test_a_row(pool, row):
    function, args, message = TABLE[row]
    world = 4 if args == ("HSDP",) else 2
    if message is None:
        pool.run(world, function, *args)
        return
    with pytest.raises(Failed, match=f"(?s){message}"):
        pool.run(world, function, *args)


def test_a_state_of_whole_parameters(pool):
    with pytest.raises(Failed, match="TypeError: accumulator: params.*every update would have to gather"):
        pool.run(2, accumulator, True)


def test_a_step_without_sharded(pool):
    with pytest.raises(Failed, match=r"TypeError: adamw: .*DTensor.*gradacc.optim.sharded\(optimizer, mesh\)"):
        pool.run(2, without_sharded, True)
