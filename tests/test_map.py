"""`docs/map.md` is true: every room stands in it, no import runs upward, and the call that it follows enters those files.

And `tests/` mirrors `gradacc/`: what a room promises is tested in the file of its name.
"""

import ast
import graphlib
import re
import sys
from pathlib import Path

import torch

import gradacc

ROOT = Path(__file__).parent.parent
MAP = (ROOT / "docs" / "map.md").read_text()
ROWS = [re.findall(r"`(\w+)`", row.split("|")[2]) for row in MAP.splitlines() if re.match(r"\| [a-z ]+ \| `", row)]
LEVEL = {room: level for level, rooms in enumerate(ROWS) for room in rooms}
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "gradacc").rglob("*.py"))
}
DOOR = "gradacc"


def imports(path):
    """The modules of gradacc that a file imports, at its top or later."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == DOOR:
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                yield inside if inside in FILES else node.module


def room(module):
    return module.split(".")[1]


def test_every_room_is_on_the_map():
    assert {room(module) for module in FILES if module != DOOR} == set(LEVEL)


def test_no_import_runs_upward():
    upward = [
        f"{module} imports {other}"
        for module, path in FILES.items()
        for other in imports(path)
        if DOOR not in (module, other) and LEVEL[room(module)] < LEVEL[room(other)]
    ]
    assert not upward


SATELLITES = ("random", "optim", "_train", "data", "checkpoint", "testing", "demo")
DOORS = ("gradacc", "gradacc.optim", "gradacc.checkpoint")


def test_satellites_import_the_door_and_the_ground():
    """And what the map gives a reason for: no more, and no less."""
    rows = re.findall(r"^\| (`[^|]*) \| (`[^|]*) \| [^|]+ \|$", MAP.split("nothing else\nof the core")[1], re.MULTILINE)
    excepted = {(who, what) for who_cell, what_cell in rows for who in names(who_cell) for what in names(what_cell)}
    public = {(value.__module__, name) for name, value in vars(gradacc).items() if hasattr(value, "__module__")}
    found = {
        (module.removeprefix("gradacc."), other.removeprefix("gradacc."))
        for module, path in FILES.items()
        if module != DOOR and room(module) in SATELLITES
        for other, name in imported_names(path)
        if other not in DOORS and room(other) not in {room(module), *ROWS[0]} and (other, name) not in public
    }
    assert found == excepted


def names(cell):
    return re.findall(r"`([^`]+)`", cell)


def imported_names(path):
    """Pairs of a module of gradacc that a file imports from, and the name; a module itself without one."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == DOOR:
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                yield (inside, None) if inside in FILES else (node.module, alias.name)


def test_there_are_no_circles():
    graph = {module: {other for other in imports(path) if other != module} for module, path in FILES.items()}
    del graph[DOOR]
    list(graphlib.TopologicalSorter(graph).static_order())


OF_SEVERAL_ROOMS = {
    "": "compositions cross_elsewhere device documents door head lora map models private_torch sentence_transformers sweep "
    "transforms",
    "checkpoint": "states trees",
    "demo": "nproc process",
    "pieces": "functions",
    "optim": "bad_input donation rules schedule step wrappers",
    "through": "beside_others faults_of_others",
    "sync": "accelerate accumulator all_reduce ends faults fuzz many_ranks strides turns",
}
"""Tests of promises that no single room keeps, or that a page makes, by folder."""

OF_NO_PACKAGE = {"benchmarks", "gpu", "laws", "on_device", "fsdp"}
"""Folders of tests that are named after another thing than a package of gradacc."""


def test_tests_mirror_the_rooms():
    rooms = {re.sub(r"(^|\.)_", r"\1", module.removeprefix("gradacc.")) for module in FILES}
    for path in (ROOT / "tests").rglob("test_*.py"):
        *folder, name = path.relative_to(ROOT / "tests").with_suffix("").parts
        name = name.removeprefix("test_")
        if (folder[:1] and folder[0] in OF_NO_PACKAGE) or name in OF_SEVERAL_ROOMS.get("/".join(folder), "").split():
            continue
        assert ".".join((*folder, name)) in rooms, f"{path} is named after no room of gradacc"


def test_a_call_enters_the_files_that_the_map_follows():
    ground, entered = set(ROWS[0]), set()

    def note(frame, event, _):
        module = frame.f_globals.get("__name__", "")
        if event == "call" and module.split(".")[0] == DOOR and room(module) not in ground:
            entered.add(module)

    def loss_fn(params, batch):
        return (batch @ params["w"]).square().mean()

    params, batch = {"w": torch.ones(256, 256)}, torch.ones(8, 256)
    before = sys.getprofile()
    sys.setprofile(note)
    try:
        gradacc.accumulate(loss_fn, steps=4)(params, batch)
    finally:
        sys.setprofile(before)
    followed, aside, _ = re.split("On the way the call|Other calls enter", MAP)
    files = named(followed) - {"gradacc._accumulator"}
    assert entered == files | entered & named(aside)
    assert len(files) <= 11


def named(text):
    """The modules whose files a text names."""
    paths = re.findall(r"`([\w/]+)\.py`", text)
    return {f"gradacc.{path.removesuffix('/__init__').replace('/', '.')}" for path in paths}


LINES, PARAMETERS = 60, 6
LONG = {
    "gradacc._accumulate.accumulate": "the options of the public function",
    "gradacc._accumulate.accumulate_and_value": "the options of the public function",
    "gradacc._accumulator.accumulator": "the options of the public function",
    "gradacc._microbatch.microbatch": "the options of the public function",
    "gradacc.optim._adam._adam": "the options of `adam` and `adamw`, and which of them it is",
}
"""Functions that may be longer, or take more, and why."""


def test_no_function_is_long_or_takes_much():
    """Lines of code, without docstrings and comments; what is inside a function counts for it."""
    found = set()
    for module, path in FILES.items():
        text = path.read_text()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and (
                code_lines(node, text.splitlines()) > LINES or parameters(node) > PARAMETERS
            ):
                found.add(f"{module}.{node.name}")
    assert found == set(LONG)


def code_lines(function, lines):
    docstrings = {
        number
        for node in ast.walk(function)
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None
        for number in range(node.body[0].lineno, node.body[0].end_lineno + 1)
    }
    numbers = range(function.lineno, function.end_lineno + 1)
    return sum(
        number not in docstrings and not lines[number - 1].strip().startswith("#") and bool(lines[number - 1].strip())
        for number in numbers
    )


def parameters(function):
    args = function.args
    named = [arg.arg for arg in (*args.posonlyargs, *args.args, *args.kwonlyargs)]
    return len(named) - (named[:1] in (["self"], ["cls"]))
