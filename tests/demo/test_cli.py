"""The command: options to settings, every mistake to one line and exit code 2."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

import pytest

from gradacc.demo import settings as defaults
from gradacc.demo.cli import main, parse
from gradacc.demo.settings import Settings


def test_options() -> None:
    assert parse(["demo"]) == Settings()
    assert parse(["demo", "--iterations", "500"]).seconds is None
    told = "demo --steps 3 --batch-size 5 --iterations 7 --seed 9 --lr 0.1 --data text --out folder"
    assert parse(told.split()) == Settings(3, 5, 7, 9, 0.1, Path("text"), Path("folder"), None)


def test_help_tells_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["demo", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for option in ("--steps", "--batch-size", "--iterations", "--seed", "--lr", "--data", "--out", "Ctrl-C"):
        assert option in text
    assert str(defaults.DEFAULT_ITERATIONS) in text


NONSENSE = [
    ([], "COMMAND"),
    (["train"], "train"),
    (["demo", "--nonsense"], "--nonsense"),
    (["demo", "--step", "2"], "--step"),
    (["demo", "text.txt"], "text.txt"),
    *(
        (["demo", "--steps", value], "--steps")
        for value in ("0", "-1", "1.5", "two", "", "1e3", "99999999999999999999")
    ),
    *((["demo", "--batch-size", value], "--batch-size") for value in ("0", "-4", "nan", "1000000000")),
    *((["demo", "--iterations", value], "--iterations") for value in ("-1", "inf", "all")),
    *((["demo", "--seed", value], "--seed") for value in ("-1", "x", str(2**64))),
    *((["demo", "--lr", value], "--lr") for value in ("0", "-1e-3", "nan", "inf", "-inf", "fast", "1e30")),
    (["demo", "--lr"], "--lr"),
]


@pytest.mark.parametrize(
    ("arguments", "named"), NONSENSE, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_nonsense_options(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    check_one_line(capsys, named)


def check_one_line(capsys: pytest.CaptureFixture[str], named: str) -> None:
    output, error = capsys.readouterr()
    assert output == ""
    assert error.startswith("gradacc")
    assert ": error: " in error
    assert error.endswith("\n")
    assert error.count("\n") == 1
    assert named in error


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Path]:
    """Paths with which nothing can be done."""
    for name in ("folder", "folder/.hidden", "hollow"):
        (tmp_path / name).mkdir()
    files = {
        "empty": b"", "blank": b" \n\n\t\n", "tiny": b"x\n", "picture": b"\x89PNG\r\n\x1a\n\0\0", "latin": b"caf\xe9 " * 99,
        "folder/data.bin": bytes(range(256)), "folder/nothing.txt": b"", "folder/.hidden/text": b"hidden text\n\n" * 50,
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "dangling").symlink_to(tmp_path / "missing")
    os.mkfifo(tmp_path / "pipe")
    names = ("missing", "dangling", "pipe", "hollow", *files, "folder")
    return {name: tmp_path / name for name in names} | {
        "device": Path("/dev/zero"),
        "below a file": tmp_path / "tiny" / "x",
    }


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("missing", "no such file or folder"),
        ("dangling", "no such file or folder"),
        ("below a file", "no such file or folder"),
        ("pipe", "neither a file nor a folder"),
        ("device", "neither a file nor a folder"),
        ("hollow", "no text in this folder"),
        ("folder", "no text in this folder"),
        ("empty", "empty"),
        ("blank", "empty"),
        ("tiny", "too few"),
        ("picture", "not a text"),
        ("latin", "not a text"),
    ],
)
def test_text_that_cannot_be_used(
    place: str, reason: str, places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--data", str(places[place]), "--out", str(tmp_path / "out")]) == 2
    check_one_line(capsys, f"--data {places[place]}: ")
    assert not (tmp_path / "out").exists()


def test_the_reason_is_told(places: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    main(["demo", "--data", str(places["latin"])])
    assert "not a text in UTF-8" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that even root cannot read")
def test_a_file_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--data", "/proc/self/mem", "--out", str(tmp_path / "out")]) == 2
    check_one_line(capsys, "--data /proc/self/mem: cannot be read: Input/output error")


@pytest.mark.parametrize("path", ["nul\0byte", "x" * 300, "line\nbreak"])
def test_a_path_that_cannot_be(path: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--data", path]) == 2
    check_one_line(capsys, "--data")
    if "\n" not in path:
        assert main(["demo", "--data", str(data), "--out", path]) == 2
        check_one_line(capsys, "--out")


@pytest.mark.parametrize("out", ["text.txt", "text.txt/below", "page", "lines"])
def test_a_folder_that_cannot_be_written(
    out: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "page" / "report.html").mkdir(parents=True)
    (tmp_path / "lines" / "metrics.jsonl").mkdir(parents=True)
    assert main(["demo", "--data", str(data), "--out", str(tmp_path / out)]) == 2
    check_one_line(capsys, f"--out {tmp_path / out}: ")


def test_the_installed_command_is_this_one() -> None:
    project = Path(__file__).parents[2] / "pyproject.toml"
    scripts = tomllib.loads(project.read_text("utf-8"))["project"]["scripts"]
    assert scripts["gradacc"].startswith("gradacc.demo")
    assert scripts["gradacc"].endswith(":main")
