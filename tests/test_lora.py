"""docs/lora.md, run as it stands: LoRA of peft end to end, and freezing and unfreezing against torch.optim."""

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import gradacc
from tests.helpers import assert_trees_close, fingerprint

PAGE = (Path(__file__).parent.parent / "docs" / "lora.md").read_text()
LORA, FREEZING = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)  # peft asks transformers for it
IMPORTS = {"torch": torch, "gradacc": gradacc}


def run(code, **scope):
    scope = IMPORTS | scope
    exec(compile(code, "docs/lora.md", "exec"), scope)
    return scope


def until(code, marker):
    return code[: code.index(marker)]


def test_lora_trains_the_adapters_alone():
    start = run(until(LORA, "for _ in range(5)"))
    model = start["model"]
    names = [name for name, param in model.named_parameters() if param.requires_grad]
    assert len(names) == 4
    assert all("lora_" in name for name in names)
    assert len(list(model.named_parameters())) == 32
    assert list(start["params"]) == names
    held = gradacc.optim.adamw().init(start["params"])
    assert sorted(held.exp_avg) == sorted(held.exp_avg_sq) == sorted(names)
    small = sum(param.numel() for param in start["params"].values())
    assert small * 20 < sum(param.numel() for param in model.parameters())

    torch.manual_seed(0)
    scope = run(LORA)
    trained = scope["model"]
    frozen = {name: param for name, param in trained.named_parameters() if name not in names}
    before = {name: param for name, param in model.named_parameters() if name not in names}
    assert all(torch.equal(frozen[name], param) for name, param in before.items())
    assert all(param.grad is None for param in trained.parameters())
    moved = dict(trained.named_parameters())
    assert all(torch.equal(moved[name], scope["state"].params[name]) for name in names)
    assert not any(torch.equal(moved[name], start["params"][name]) for name in names)


def test_lora_is_the_loop_by_hand():
    scope = run(until(LORA, "optimizer ="))
    model = scope["model"].double().eval()
    batch = {"ids": torch.randint(1, 64, (8, 12))}
    batch["ids"][:3, 5:] = 0
    apply, params, _ = gradacc.functional(model)
    scope["apply"] = apply
    generator = torch.Generator().manual_seed(0)
    params = {
        name: param + 0.1 * torch.randn(param.shape, generator=generator, dtype=param.dtype)
        for name, param in params.items()
    }
    state = fingerprint(dict(model.state_dict()))
    grads = gradacc.accumulate(scope["loss_fn"], steps=4)(params, batch)
    assert fingerprint(dict(model.state_dict())) == state
    reference = copy.deepcopy(model)
    reference.load_state_dict(params, strict=False)
    targets = batch["ids"][:, 1:].flatten()
    logits = reference(input_ids=batch["ids"]).logits[:, :-1].flatten(0, 1)
    nn.functional.cross_entropy(logits, targets, ignore_index=0).backward()
    assert_trees_close(grads, {name: p.grad for name, p in reference.named_parameters() if p.requires_grad})


def imperative(module, data, cls, head, body):
    """The same in torch: a group that is added after three steps and frozen after six."""
    module = copy.deepcopy(module)
    optimizer = cls(module[2].parameters(), **head)
    for n in range(9):
        if n == 3:
            optimizer.add_param_group({"params": list(module[0].parameters()), **body})
        module[0].requires_grad_(3 <= n < 6)
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(data["x"]), data["y"]).backward()
        optimizer.step()
    return dict(module.state_dict())


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", ["adamw", "from_torch"])
def test_freezing_and_unfreezing(kind):
    code = FREEZING
    options = dict(lr=1e-2), dict(lr=1e-3)
    cls = torch.optim.AdamW
    if kind == "from_torch":  # of a rule whose state does not begin with zeros
        cls, options = torch.optim.NAdam, (dict(lr=1e-2), dict(lr=1e-3))
        for lr in ("1e-2", "1e-3"):
            assert f"gradacc.optim.adamw({lr})" in code
            code = code.replace(f"gradacc.optim.adamw({lr})", f"gradacc.optim.from_torch(torch.optim.NAdam, lr={lr})")
    torch.manual_seed(0)
    start = run(until(code, "# the head alone\n"))
    torch.manual_seed(0)
    scope = run(code)
    expected = imperative(start["module"], start["data"], cls, *options)
    assert_trees_close(dict(scope["module"].state_dict()), expected)
    assert len(scope["state"].opt_state.inner) == 1


@pytest.mark.parametrize("kind", ["adamw", "from_torch", "sgd"])
def test_the_state_of_another_parameter_of_the_same_shape_is_refused(kind):
    optimizer = {
        "adamw": gradacc.optim.adamw(0.1),
        "from_torch": gradacc.optim.from_torch(torch.optim.AdamW, lr=0.1),
        "sgd": gradacc.optim.sgd(0.1, momentum=0.9),
    }[kind]
    one, other = {"a": torch.ones(2)}, {"b": torch.ones(2)}
    _, state = optimizer.step(one, one, optimizer.init(one))
    with pytest.raises(ValueError, match=f"{kind}: state.*a.*other parameters"):
        optimizer.step(other, other, state)
