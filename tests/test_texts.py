"""What is read from files as text, and what is not text."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from flocking.texts import TextFiles, decoded, read_text

TEXT = "naïve 日本 text\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_utf_8_is_read(encoding: str, tmp_path: Path) -> None:
    assert decoded(TEXT.encode(encoding), "it") == TEXT
    (tmp_path / "a.txt").write_bytes(TEXT.replace("\n", "\r\n").encode(encoding))
    assert read_text(tmp_path / "a.txt") == TEXT


@pytest.mark.parametrize("order", ["le", "be"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
@pytest.mark.parametrize("text", ["plain English", TEXT])
def test_other_encodings_are_refused(encoding: str, order: str, text: str) -> None:
    """With a byte order mark, by their names."""
    with pytest.raises(
        ValueError, match=r"^notes.txt is not text in UTF-8 .*: convert it first\.$"
    ):
        decoded(text.encode(f"{encoding}-{order}"), "notes.txt")
    with pytest.raises(ValueError, match=rf"\(byte 0\), but in {encoding.upper()}: convert it"):
        decoded(("\ufeff" + text).encode(f"{encoding}-{order}"), "notes.txt")


@pytest.mark.parametrize(
    "raw", [b"\x89PNG\r\n\x1a\n\0\0", b"PK\x03\x04\0", b"abc\0", b"\xff\xfe", bytes(range(256))]
)
def test_files_of_no_text_are_refused(raw: bytes) -> None:
    with pytest.raises(ValueError, match=r"^it is not text in UTF-8 .*: convert it first\.$"):
        decoded(raw, "it")


def test_random_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match="convert it first"):
        decoded(os.urandom(10_000), "it")


def folder(tmp_path: Path) -> Path:
    """Of two text files, a file of JSON lines, and another."""
    (tmp_path / "a.txt").write_text("one", encoding="utf-8")
    (tmp_path / "b.txt").write_text("two", encoding="utf-8")
    lines = ['{"text": "three", "n": 1}', "", '"four"', '{"text": "fünf"}']
    (tmp_path / "c.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "d.md").write_text("five", encoding="utf-8")
    return tmp_path


def test_texts_of_files_folders_and_patterns(tmp_path: Path) -> None:
    place = folder(tmp_path)
    texts = TextFiles([str(place)])
    assert list(texts) == list(texts) == ["one", "two", "three", "four", "fünf"]
    names = ["a.txt", "b.txt", "c.jsonl:1", "c.jsonl:3", "c.jsonl:4"]
    assert texts.names == [str(place / name) for name in names]
    assert len(texts) == 5
    assert list(TextFiles([f"{place}/*.txt", f"{place}/d.md"])) == ["one", "two", "five"]
    deep = tmp_path / "deep"
    deep.mkdir()
    (deep / "c.jsonl").write_text('"six"\n', encoding="utf-8")
    assert list(TextFiles([f"{tmp_path}/**/d*/*.jsonl"])) == ["six"]
    assert list(TextFiles([f"{tmp_path}/?.jsonl"])) == ["three", "four", "fünf"]


def test_a_pattern_that_meets_links_reads_each_file_once(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a.txt").write_text("one")
    (tmp_path / "inner" / "again").symlink_to(tmp_path)
    (tmp_path / "b.txt").symlink_to(tmp_path / "inner" / "a.txt")
    assert list(TextFiles([f"{tmp_path}/**/*.txt"])) == ["one"]
    named = [str(tmp_path / "b.txt"), str(tmp_path / "inner" / "a.txt")]
    assert list(TextFiles(named)) == ["one", "one"]


def test_other_fields_of_json_lines(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"id": "7", "article": "one"}\n{"article": 3}\n')
    with pytest.raises(ValueError, match=r"x.jsonl:1 has no text in field 'text' \(.*id, article"):
        list(TextFiles([str(tmp_path / "x.jsonl")]))
    read = iter(TextFiles([str(tmp_path / "x.jsonl")], "article"))
    assert next(read) == "one"
    with pytest.raises(ValueError, match=r"x.jsonl:2 has no text in field 'article'"):
        next(read)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["nothing.txt"], "nothing.txt does not exist: name a text file, a folder or a pattern"),
        (["no*.txt"], r"no\*.txt does not exist"),
        (["empty"], "empty has no files whose names end in .txt or .jsonl"),
        (["none.jsonl"], "none.jsonl: there is no line with a text"),
        ([], "no file was named"),
    ],
)
def test_what_names_no_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str], said: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "none.jsonl").write_text("\n \n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=said):
        TextFiles(names)


def test_pipes_are_read_once_and_held(tmp_path: Path) -> None:
    """As a shell's <(zcat a.txt.gz), which is gone through more than once."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=("From a pipe.\r\n",))
    writer.start()
    texts = TextFiles([str(pipe)])
    writer.join()
    assert list(texts) == list(texts) == ["From a pipe.\n"]
    assert texts.names == [str(pipe)]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{", "x.jsonl:1 is not JSON"),
        (b"[1]", "x.jsonl:1 is neither an object nor a string"),
        (b'"\xff"', "x.jsonl:1 is not text in UTF-8"),
    ],
)
def test_lines_that_are_no_texts(tmp_path: Path, line: bytes, said: str) -> None:
    (tmp_path / "x.jsonl").write_bytes(line)
    with pytest.raises(ValueError, match=said):
        list(TextFiles([str(tmp_path / "x.jsonl")]))
