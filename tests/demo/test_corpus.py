"""The text: whole, ragged, the same every time, and held out by document."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradacc.demo import corpus
from gradacc.demo.corpus import Document, load, pieces, split
from gradacc.demo.settings import DemoError

TEXTS = st.lists(st.sampled_from([b"a", b"\n", b"\r", b" ", b"words of text", b"\n\n", b"\xc3\xa9"]), max_size=60).map(
    b"".join
)


@given(TEXTS, st.integers(2, 40))
def test_pieces_are_the_text_cut_up(text: bytes, context: int) -> None:
    cut = pieces(text, context)
    assert b"".join(cut) == text
    assert all(1 <= len(piece) <= context for piece in cut)


@given(TEXTS, st.integers(2, 40))
def test_no_paragraph_begins_inside_a_piece(text: bytes, context: int) -> None:
    for piece in pieces(text, context):
        assert b"\n\n" not in piece.rstrip(b"\n")


@given(st.lists(TEXTS, max_size=45), st.integers(2, 40))
def test_the_parts_are_the_documents(texts: list[bytes], context: int) -> None:
    train, held_out = split([Document(str(index), text) for index, text in enumerate(texts)], context)
    expected = [piece for text in texts for piece in pieces(text, context)]
    found = [piece for document in train + held_out for piece in document]
    assert sorted(piece for piece in found if len(piece) > 1) == sorted(piece for piece in expected if len(piece) > 1)


def test_documents_are_held_out_whole() -> None:
    documents = [Document(str(index), f"document {index} ".encode() * 30) for index in range(100)]
    train, held_out = split(documents, 64)
    assert len(train), len(held_out) == (95, 5)
    whole = {document.text for document in documents}
    assert {b"".join(document) for document in train} | {b"".join(document) for document in held_out} == whole
    assert not {b"".join(document) for document in train} & {b"".join(document) for document in held_out}


def test_the_standard_library_is_the_default() -> None:
    first = load(None, 128)
    assert first == load(None, 128)
    assert first.bytes > 5_000_000
    assert "standard library" in first.source
    lengths = sorted(len(piece) for piece in first.train)
    assert lengths[0] >= 2
    assert lengths[-1] == 128
    assert lengths[len(lengths) // 10] < 0.6 * lengths[len(lengths) // 2]  # ragged


def test_a_single_file_has_held_out_sections(data: Path, text: bytes) -> None:
    found = load(data, 48)
    assert found.documents == (19, 1)
    assert found.bytes == len(text)
    assert found.source == str(data)


def test_a_folder_is_read_in_order_without_what_is_no_text(tmp_path: Path) -> None:
    for index in range(40):
        path = tmp_path / f"folder{index % 3}" / f"{39 - index}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"text number {index}\n", "utf-8")
    before = load(tmp_path, 48)
    assert before.documents == (38, 2)
    (tmp_path / "binary.txt").write_bytes(b"zero \0 byte")
    (tmp_path / "latin1.txt").write_bytes("é".encode("latin-1") * 9)
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "nowhere.txt").symlink_to(tmp_path / "missing")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("hidden")
    assert load(tmp_path, 48) == before


def test_reading_stops_at_the_limit_between_characters(
    tmp_path: Path, data: Path, text: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = text.index("ï".encode()) + 1
    limit = text.index("ï".encode(), limit + 200) + 1
    monkeypatch.setattr(corpus, "MAX_BYTES", limit)
    assert load(data, 48).bytes == limit - 1
    assert load(tmp_path, 48).bytes == limit - 1
    assert "reading stopped" in corpus.describe(load(data, 48))


def test_an_unreadable_file_in_a_folder_is_passed_over(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret.txt").write_text("secret\n\n" * 9)
    ordinary = Path.open

    def refusing(path: Path, *arguments: str) -> object:
        if path.name == "secret.txt":
            raise PermissionError(13, "Permission denied")
        return ordinary(path, *arguments)

    monkeypatch.setattr(Path, "open", refusing)
    assert load(tmp_path, 48).train == load(data, 48).train
    with pytest.raises(DemoError, match=r"secret.txt: cannot be read: Permission denied"):
        load(tmp_path / "secret.txt", 48)


def test_ctrl_c_while_reading(data: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        load(data.parent, 48, interrupted=lambda: True)
