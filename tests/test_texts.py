"""What is read from files as text, and what is not text."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flocking.texts import decoded, read_text

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
