"""What the documents show runs: the README's Python and the notebooks; and every public name has an example."""

import re
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient

import gradacc

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
README = (ROOT / "README.md").read_text()


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_runs(path):
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=240, kernel_name="python3", resources=resources).execute()


def test_the_readme_runs_from_top_to_bottom(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # it saves a checkpoint
    blocks = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    runnable = [block for block in blocks if "import torch" in block or "check_accumulation" in block]
    assert len(runnable) == 4
    scope: dict = {}
    for block in runnable:
        exec(compile(block, "README.md", "exec"), scope)
    assert "nats a token" in capsys.readouterr().out
    assert scope["report"].exact
    assert scope["state"].step == 3
    loss_fn, params, batch = (scope[name] for name in ("loss_fn", "params", "batch"))
    expected = torch.func.grad(lambda p, b: loss_fn(p, b).value)(params, batch)
    torch.testing.assert_close(gradacc.accumulate(loss_fn, steps=4)(params, batch), expected)
    undisturbed = gradacc.accumulate(loss_fn)(scope["state"].params, [batch, batch])
    torch.testing.assert_close(scope["grads"], undisturbed)


def test_the_two_sides_of_the_readmes_comparison_agree():
    """The loop by hand and the three lines, as they stand in the README, on real modules and micro-batches."""
    import torch.nn.functional as F

    hand, ours = re.findall(r"</?t[dh]>\s*```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)

    class Part:
        def __init__(self, length):
            self.x, self.y = torch.randint(0, 9, (2, length)), torch.randint(0, 9, (2, length))

    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 9)).double()
    scope = {
        "gradacc": gradacc,
        "module": module,
        "microbatches": [Part(3), Part(7), Part(1)],
        "count": lambda m: m.y.numel(),
        "cross_entropy_sum": lambda logits, y: F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum"),
    }
    exec(hand, scope)
    by_hand, loss = {name: grad.clone() for name, grad in scope["grads"].items()}, scope["loss"]
    exec(ours, scope)
    torch.testing.assert_close(scope["grads"], by_hand)
    torch.testing.assert_close(scope["loss"], loss)


def test_everything_public_has_a_docstring_with_an_example():
    public = {name for name in vars(gradacc) if not name.startswith("_") and callable(getattr(gradacc, name))}
    assert public == {
        "accumulate",
        "accumulate_and_value",
        "Accumulator",
        "accumulator",
        "all_reduce",
        "functional",
        "Mean",
        "TrainState",
        "train_step",
    }
    for name in public:
        assert ">>> " in getattr(gradacc, name).__doc__, name
    assert re.fullmatch(r"\d+\.\d+\.\d+", gradacc.__version__)
