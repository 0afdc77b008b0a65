"""What the documents show runs: the pages' Python and the notebooks; and every public name has an example."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
import torch
from nbclient import NotebookClient

import gradacc
from benchmarks import pages
from tests import recipes, vision
from tests.helpers import some_slow

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = sorted((ROOT / "docs" / "recipes").glob("*.md"))


def skip_without(packages):
    """Where one is not installed."""
    missing = {name for name in packages if not vision.has(name)}
    if missing:
        pytest.skip(f"not installed: {', '.join(sorted(missing))}; `make test-slow` does it")


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.timeout(600)  # that of MiniLM takes minutes
@pytest.mark.parametrize("path", some_slow(NOTEBOOKS), ids=lambda path: path.name)
def test_notebook_runs(path):
    notebook = nbformat.read(path, as_version=4)
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    own = re.findall(r"\"(\w+)\.py\"", code)  # modules that it writes
    skip_without({*recipes.imported(code)} - {*own})
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=240, kernel_name="python3", resources=resources).execute()


def blocks(text):
    """The Python blocks of a page; those of the README's table have a test of their own."""
    return recipes.blocks(re.sub("<table>.*?</table>", "", text, flags=re.DOTALL))


def is_of_ranks(block):
    return "init_process_group" in block


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning"
)  # torch's own, in forward mode
@pytest.mark.parametrize("path", [path for path in PAGES if path.name != "lora.md"], ids=lambda path: path.name)
def test_a_page_runs_from_top_to_bottom(path, monkeypatch, tmp_path):
    """The page on LoRA has a test of its own, which compares what it does: tests/test_lora.py."""
    monkeypatch.chdir(tmp_path)  # some save a checkpoint
    scope: dict = {}
    for block in blocks(path.read_text()):
        if not is_of_ranks(block):
            exec(compile(block, path.name, "exec"), scope)


@pytest.mark.parametrize(
    "path",
    some_slow(
        [path for path in PAGES if is_of_ranks(path.read_text()) and path.name != "cross.md"], ROOT / "README.md"
    ),
    ids=lambda path: path.name,
)
def test_a_page_s_ranks_run(path, tmp_path):
    """What stands before it too, since it goes on from there. docs/cross.md has tests/test_cross_elsewhere.py."""
    own = [block for block in blocks(path.read_text()) if "transformers" not in block]
    last = max(i for i, block in enumerate(own) if is_of_ranks(block))
    begin = "torch.distributed.init_process_group()"
    code = "\n".join(["import torch", begin, "torch.manual_seed(0)", *own[: last + 1]])
    first, _, rest = code.partition(begin)
    code = first + begin + rest.replace(begin, "pass")  # a program has it at the top
    if "destroy_process_group" not in code:
        code += "\nprint(torch.distributed.get_rank(), loss, flush=True)\ntorch.distributed.destroy_process_group()"
    (tmp_path / "train.py").write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--log-dir", "said", "--redirects", "1", "train.py"]  # a file for each rank: lines do not mix
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    zero, one = (next((tmp_path / "said").glob(f"**/{rank}/stdout.log")).read_text() for rank in (0, 1))
    assert (zero[:2], one[:2]) == ("0 ", "1 ")
    assert zero[2:] == one[2:]


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_the_large_batch(path, tmp_path):
    """Each page ends with that comparison."""
    skip_without(recipes.imported("\n".join(blocks(path.read_text()))))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tests.recipes", str(path)]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


def code_lines(block):
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in block.splitlines())


def test_recipes_are_short_and_their_lines_are_counted_right():
    """As many lines of training as the table says; at most forty, but for the model, the data and the check."""
    table = (ROOT / "docs" / "recipes.md").read_text()
    said = {
        name: int(lines)
        for name, lines in re.findall(r"^\| \[.*\]\(recipes/(\w+)\.md\) \| (\d+) \|", table, re.MULTILINE)
    }
    counted = {}
    for path in RECIPES:
        parts = re.split(r"^Training\b.*\n", path.read_text(), flags=re.MULTILINE)
        assert len(parts) == 2, path
        first, *_ = blocks(parts[1])
        assert "assert_close" in "".join(blocks(parts[1])), path
        counted[path.stem] = code_lines(first)
    assert said == counted
    assert max(counted.values()) <= 40


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("path", [*PAGES, *RECIPES], ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text()):
        assert "://" in target or (path.parent / target).exists(), target


def test_the_page_of_figures_is_of_these_results():
    assert pages.page() == pages.PAGE.read_text(), "run: python -m benchmarks.pages"
    assert pages.of_scale() == pages.OF_SCALE.read_text(), "run: python -m benchmarks.pages"
    assert pages.of_pieces() == pages.OF_PIECES.read_text(), "run: python -m benchmarks.pages"


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "docs", str(tmp_path / "site")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    reference = (tmp_path / "site" / "api.html").read_text()
    for door in (gradacc, gradacc.checkpoint, gradacc.data, gradacc.optim, gradacc.random, gradacc.testing):
        names = {name for name in door.__all__ if not isinstance(getattr(door, name), ModuleType | str)}
        assert not {name for name in names if f'id="{door.__name__}.{name}"' not in reference}, door.__name__
    assert 'href="transforms.html"><span class="doc">docs/transforms.md' in reference


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


def docstrings():
    """``(where, docstring)`` of every module, class and function of gradacc."""
    for path in sorted((ROOT / "gradacc").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                yield f"{path.relative_to(ROOT)}: {getattr(node, 'name', '')}", ast.get_docstring(node) or ""


def test_docstrings_are_short():
    """Tables and long stories stand on the pages, which a docstring names."""
    lengths = {where: len(text.splitlines()) for where, text in docstrings()}
    assert len(lengths) > 400
    assert not {where: length for where, length in lengths.items() if length > 80}


def test_pages_that_docstrings_name_exist():
    named = {page for _, text in docstrings() for page in re.findall(r"docs/\w+\.md", text)}
    assert "docs/transforms.md" in named
    assert not {page for page in named if not (ROOT / page).exists()}


def test_everything_public_has_a_docstring_with_an_example():
    """But for what annotations alone name."""
    of_annotations = {
        "AccumulateOptions",
        "AccumulatorOptions",
        "AccumulatorState",
        "AllReduce",
        "Apply",
        "Backward",
        "BatchNorm",
        "MicrobatchOptions",
        "Nonfinite",
        "Through",
        "ReduceScatter",
        "Reduction",
        "ShardFacts",
        "Sync",
        "TensorTree",
    }
    public = set(gradacc.__all__) - of_annotations
    assert public == {
        "__version__",
        "accumulate",
        "accumulate_and_value",
        "Accumulator",
        "accumulator",
        "all_reduce",
        "batch_norm",
        "checkpoint",
        "cross",
        "data",
        "Kept",
        "functional",
        "Mean",
        "microbatch",
        "Moments",
        "optim",
        "random",
        "reduce_scatter",
        "Shard",
        "testing",
        "TrainState",
        "train_step",
    }
    for name in public:
        value = getattr(gradacc, name)
        assert isinstance(value, ModuleType | str) or ">>> " in value.__doc__, name
    assert re.fullmatch(r"\d+\.\d+\.\d+", gradacc.__version__)
