"""`functional` of a module that ``fully_shard`` has divided."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils.checkpoint import checkpoint

import gradacc
from gradacc import optim
from tests.fsdp import cases
from tests.helpers import assert_trees_close, assert_trees_equal
from tests.workers import Failed


class Block(nn.Module):
    def __init__(self, again):
        super().__init__()
        self.up, self.down, self.again = nn.Linear(6, 10), nn.Linear(10, 6, bias=False), again
        self.register_buffer("scale", torch.tensor(0.5))

    def inner(self, x):
        return x + self.scale * self.down(torch.tanh(self.up(x)))

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False) if self.again else self.inner(x)


class Model(nn.Module):
    """Tied weights, blocks one of which is run again in the backward pass, and a part that is frozen, if asked for."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList([Block(False), Block(True)])
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def model_of():
    torch.manual_seed(4)
    return Model().double()


def fully(model, mesh, grouped):
    """Each block by itself, or both as one; then the rest."""
    for part in [[*model.blocks]] if grouped else model.blocks:
        fully_shard(part, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def tokens_of(rank):
    return torch.randint(11, (2 + rank, 5), generator=torch.Generator().manual_seed(rank))


def loss_of(apply):
    def loss_fn(params, tokens):
        logits = apply(params, tokens[:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    return loss_fn


def trained(apply, params, optimizer, sync, tokens, donate=False, steps=5):
    step = gradacc.train_step(
        gradacc.accumulate_and_value(loss_of(apply), steps=2, sync=sync), optimizer, donate=donate
    )
    state, told = gradacc.TrainState(params, optimizer.init(params)), []
    for _ in range(steps):
        state, metrics = step(state, tokens)
        told.append((metrics["loss"], metrics["grad_norm"]))
    return state, told


def reference(world):
    apply, params, _ = gradacc.functional(model_of())
    tokens = torch.cat([tokens_of(rank) for rank in range(world)])
    return trained(apply, params, optim.adamw(0.05), None, tokens)


def five_steps(group, grouped, donate):
    mesh, rank = cases.mesh_of(group), dist.get_rank(group)
    model = fully(model_of(), mesh, grouped)
    apply, params, _ = gradacc.functional(model)
    assert all(isinstance(leaf, DTensor) for leaf in params.values())
    held = {name: leaf.to_local().clone() for name, leaf in params.items()}
    optimizer = optim.sharded(optim.adamw(0.05), mesh)
    state, told = trained(apply, params, optimizer, gradacc.reduce_scatter(mesh), tokens_of(rank), donate)
    own = dict(model.named_parameters())
    for name, leaf in state.params.items():
        assert isinstance(own[name], DTensor), "FSDP's hooks have run"
        assert torch.equal(own[name].to_local(), leaf.to_local() if donate else held[name])
        with torch.no_grad():
            own[name].copy_(leaf)
    # FSDP's own passes, with the new parameters; and then a step of ours.
    tokens = tokens_of(rank)
    loss = loss_of(lambda params, tokens: model(tokens))(None, tokens)
    loss.backward()
    grads = {name: param.grad.full_tensor() for name, param in model.named_parameters()}
    model.zero_grad()
    after, _ = trained(
        apply, gradacc.functional(model)[1], optimizer, gradacc.reduce_scatter(mesh), tokens, False, steps=1
    )
    whole = cases.undivided((state.params, after.params))
    return *whole, told, loss.detach(), grads


@pytest.mark.parametrize(("grouped", "donate", "world"), [(False, True, 2), (True, False, 3), (False, False, 1)])
def test_steps_of_a_divided_module(pool, grouped, donate, world):
    """As of the whole module; which then goes on by itself."""
    expected, losses = reference(world)
    apply, params, _ = gradacc.functional(model_of())
    optimizer = optim.adamw(0.05)
    loss_fn, grads = loss_of(apply), []
    for rank in range(world):
        grads.append(gradacc.accumulate_and_value(loss_fn, steps=1)(expected.params, tokens_of(rank)))
    mean = {name: sum(each[0][name] for each in grads) / world for name in params}  # FSDP averages ranks
    tokens = torch.cat([tokens_of(rank) for rank in range(world)])
    next_one, _ = trained(apply, expected.params, optimizer, None, tokens, steps=1)
    for rank, (params, after, told, loss, own) in enumerate(pool.run(world, five_steps, grouped, donate)):
        assert_trees_close(params, expected.params, rtol=1e-9, atol=1e-11)
        assert_trees_close(told, losses)
        assert_trees_close(loss, grads[rank][1])
        assert_trees_close(own, mean, rtol=1e-8, atol=1e-11)
        assert_trees_close(after, next_one.params, rtol=1e-9, atol=1e-11)


def without_fsdp_hooks(group):
    mesh, rank = cases.mesh_of(group), dist.get_rank(group)
    model, seen = model_of(), []
    model.blocks[0].register_forward_pre_hook(lambda module, args: seen.append("before"))
    fully(model, mesh, False)
    model.blocks[0].register_forward_hook(lambda module, args, output: 2 * output)
    apply, params, _ = gradacc.functional(model)
    whole = cases.undivided(params)
    hooks = [len(hooks) for part in model.modules() for hooks in (part._forward_hooks, part._forward_pre_hooks)]
    with CommDebugMode() as counter:
        output = apply(whole, tokens_of(rank))
    assert counter.get_total_counts() == 0
    assert seen == ["before"]
    assert hooks == [len(hooks) for part in model.modules() for hooks in (part._forward_hooks, part._forward_pre_hooks)]
    return output


def test_other_hooks_run(pool):
    """FSDP's do not: nothing crosses in a forward pass."""
    model = model_of()
    model.blocks[0].register_forward_hook(lambda module, args, output: 2 * output)
    for rank, output in enumerate(pool.run(2, without_fsdp_hooks)):
        assert_trees_equal(output, model(tokens_of(rank)).detach())


def with_a_frozen_base(group):
    mesh, rank = cases.mesh_of(group), dist.get_rank(group)
    model = model_of()
    model.blocks[0].requires_grad_(False)
    apply, params, _ = gradacc.functional(fully(model, mesh, False))
    sync = gradacc.reduce_scatter(mesh)
    with pytest.raises(ValueError, match=r"apply: \['blocks.0.up.weight'.*full_tensor"):
        gradacc.accumulate(loss_of(apply), steps=2, sync=sync)(params, tokens_of(rank))
    base = {name: leaf.full_tensor() for name, leaf in model.named_parameters() if not leaf.requires_grad}
    grad_fn = gradacc.accumulate(
        loss_of(lambda params, *inputs: apply({**params, **base}, *inputs)), steps=2, sync=sync
    )
    return cases.undivided(grad_fn(params, tokens_of(rank)))


def test_a_frozen_part(pool):
    model = model_of()
    model.blocks[0].requires_grad_(False)
    apply, params, _ = gradacc.functional(model)
    expected = gradacc.accumulate(loss_of(apply), steps=1)(params, torch.cat([tokens_of(rank) for rank in range(2)]))
    for grads in pool.run(2, with_a_frozen_base):
        assert_trees_close(grads, expected)


def refused(group, what):
    mesh, rank = cases.mesh_of(group), dist.get_rank(group)
    if what == "mixed precision":
        return gradacc.functional(fully_shard(model_of(), mesh=mesh, mp_policy=MixedPrecisionPolicy(torch.bfloat16)))
    model = fully(model_of(), mesh, False)
    apply, params, _ = gradacc.functional(model)
    if what == "outside":
        return apply(params, tokens_of(rank))
    if what == "compiled":
        return torch.compile(lambda *args: apply(*args), backend="eager", fullgraph=True)(
            cases.undivided(params), tokens_of(rank)
        )
    model(tokens_of(rank))  # leaves its root's parameters whole
    if what == "reshard":
        for part in (*model.blocks, model):
            part.reshard()
        assert all(isinstance(leaf, DTensor) for leaf in gradacc.functional(model)[1].values())
    return gradacc.functional(model) and what != "reshard"


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("mixed precision", r"ValueError: functional: a FSDPModel has a MixedPrecisionPolicy \(.*bfloat16.*autocast"),
        ("outside", r"ValueError: apply: \['embed.weight'.*DTensor.full_tensor\(\)"),
        ("compiled", r"fully_shard has divided the module, and in a compiled function FSDP's hooks would run"),
        ("whole now", r"ValueError: functional: a FSDPModel holds whole parameters.*module.reshard\(\)"),
    ],
)
def test_what_a_divided_module_cannot(pool, what, message):
    with pytest.raises(Failed, match=message):
        pool.run(2, refused, what)


def test_after_reshard(pool):
    assert pool.run(2, refused, "reshard") == [False, False]
