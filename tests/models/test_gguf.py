"""GGUF files that are not what they say: one sentence each, and nothing slow before it."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter, quantize

from flocking.models import gguf as ours

Q4_0 = GGMLQuantizationType.Q4_0


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small file with metadata of every kind and tensors of two types."""
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_rope_freq_base(1e4)
    writer.add_add_bos_token(True)
    writer.add_name("small")
    writer.add_custom_alignment(64)
    writer.add_uint16("split.count", 1)
    writer.add_uint16("split.no", 1)
    writer.add_token_list(["a", "b", "é", "<s>"])
    writer.add_token_scores([0.0, 1.0, 2.0, 3.0])
    writer.add_tensor("first", np.arange(12, dtype=np.float32).reshape(3, 4))
    values = np.linspace(-1, 1, 5 * 64, dtype=np.float32).reshape(5, 64)
    writer.add_tensor("block", quantize(values, Q4_0), raw_dtype=Q4_0)
    writer.add_tensor("final", np.arange(8, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def after(raw: bytes, name: bytes) -> int:
    """Where in a file what follows a name begins."""
    return raw.index(struct.pack("<Q", len(name)) + name) + 8 + len(name)


def put(raw: bytes, at: int, letters: str, *values: object) -> bytes:
    new = struct.pack(f"<{letters}", *values)
    return raw[:at] + new + raw[at + len(new) :]


def renamed(raw: bytes, old: bytes, new: bytes) -> bytes:
    assert len(old) == len(new)
    assert raw.count(old) == 1
    return raw.replace(old, new)


def place_of(raw: bytes, tensor: bytes, dimensions: int) -> int:
    """Where a tensor's type and offset are."""
    return after(raw, tensor) + 4 + 8 * dimensions


BAD = {
    "empty": (lambda raw: b"", OSError, "is empty"),
    "text": (lambda raw: b"Once upon a time", ValueError, r"no GGUF file .*begins with b'Once'"),
    "old format": (lambda raw: b"tjgg" + raw[4:], ValueError, "no GGUF file"),
    "archive": (lambda raw: b"PK\3\4" + raw[4:], ValueError, "zip archive"),
    "pointer": (
        lambda raw: b"version https://git-lfs.github.com/spec/v1\n",
        ValueError,
        "git lfs pull",
    ),
    "magic alone": (lambda raw: raw[:4], OSError, "ends within its header"),
    "version 1": (lambda raw: put(raw, 4, "I", 1), ValueError, "version 1 of GGUF.*write it again"),
    "version 9": (lambda raw: put(raw, 4, "I", 9), ValueError, "version 9 of GGUF"),
    "byte order": (lambda raw: put(raw, 4, "I", 3 << 24), ValueError, "other byte order"),
    "many tensors": (lambda raw: put(raw, 8, "Q", 2**40), OSError, "1,099,511,627,776 tensors"),
    "many values": (lambda raw: put(raw, 16, "Q", 2**63), OSError, "values of metadata"),
    "fewer values": (lambda raw: put(raw, 16, "Q", 1), OSError, "get the file again"),
    "more tensors": (lambda raw: put(raw, 8, "Q", 4), OSError, "get the file again"),
    "fewer tensors": (
        lambda raw: put(raw, 8, "Q", 2),
        OSError,
        "has .* bytes behind its last tensor",
    ),
    "long name": (
        lambda raw: put(raw, after(raw, b"general.architecture") - 28, "Q", 2**62),
        OSError,
        "ends within its metadata",
    ),
    "longer name": (
        lambda raw: put(raw, after(raw, b"general.architecture") - 28, "Q", 250),
        OSError,
        "has a name of 2.. characters in its metadata|not UTF-8",
    ),
    "unknown kind": (
        lambda raw: put(raw, after(raw, b"llama.block_count"), "I", 77),
        OSError,
        "unknown kind 77 in the metadata 'llama.block_count'",
    ),
    "long array": (
        lambda raw: put(raw, after(raw, b"tokenizer.ggml.scores") + 8, "Q", 2**33),
        OSError,
        r"8,589,934,592 values in the metadata 'tokenizer\.ggml\.scores'",
    ),
    "many strings": (
        lambda raw: put(raw, after(raw, b"tokenizer.ggml.tokens") + 8, "Q", 2**33),
        OSError,
        r"8,589,934,592 values in the metadata 'tokenizer\.ggml\.tokens'",
    ),
    "array of arrays": (
        lambda raw: put(raw, after(raw, b"tokenizer.ggml.scores") + 4, "I", 9),
        OSError,
        "array of arrays",
    ),
    "not UTF-8": (lambda raw: renamed(raw, "é".encode(), b"\xff\xfe"), OSError, "not UTF-8"),
    "metadata twice": (
        lambda raw: renamed(raw, b"tokenizer.ggml.scores", b"tokenizer.ggml.tokens"),
        OSError,
        r"metadata 'tokenizer\.ggml\.tokens' twice",
    ),
    "tensor twice": (
        lambda raw: put(raw, after(raw, b"block") - 5, "5s", b"first"),
        OSError,
        "has the tensor 'first' twice",
    ),
    "unknown type": (
        lambda raw: put(raw, place_of(raw, b"block", 2), "I", 99),
        ValueError,
        "tensor 'block' of type 99, which gguf .* does not know: try a newer gguf",
    ),
    "type that was removed": (
        lambda raw: put(raw, place_of(raw, b"block", 2), "I", 4),
        ValueError,
        "tensor 'block' of type 4,",
    ),
    "type of longer blocks": (
        lambda raw: put(raw, place_of(raw, b"block", 2), "I", GGMLQuantizationType.Q4_K),
        OSError,
        "tensor 'block' of 5 x 64, which type Q4_K cannot have",
    ),
    "type of other size": (
        lambda raw: put(raw, place_of(raw, b"block", 2), "I", GGMLQuantizationType.Q8_0),
        OSError,
        "tensor 'block' would end at byte",
    ),
    "no elements": (
        lambda raw: put(raw, after(raw, b"first") + 4, "Q", 0),
        OSError,
        "tensor 'first' of 3 x 0,",
    ),
    "other shape": (
        lambda raw: put(raw, after(raw, b"first") + 4, "Q", 2**60),
        OSError,
        "sizes in its table are wrong|would end",
    ),
    "last one longer": (
        lambda raw: put(raw, after(raw, b"final") + 4, "Q", 2**50),
        OSError,
        "tensor 'final' would end at byte",
    ),
    "five dimensions": (
        lambda raw: put(raw, after(raw, b"first"), "I", 5),
        OSError,
        "tensor 'first' with 5 dimensions",
    ),
    "offset behind": (
        lambda raw: put(raw, place_of(raw, b"first", 2) + 4, "Q", 2**40),
        OSError,
        "at byte 64 of its data, where it should be at 0",
    ),
    "same offset": (
        lambda raw: put(raw, place_of(raw, b"block", 2) + 4, "Q", 0),
        OSError,
        "at byte 0 of its data, where it should be",
    ),
    "offset between": (
        lambda raw: put(raw, place_of(raw, b"final", 1) + 4, "Q", 240),
        OSError,
        "tensor 'final' at byte 240 of its data, where it should be at 256",
    ),
    "alignment": (
        lambda raw: put(raw, after(raw, b"general.alignment") + 4, "I", 48),
        OSError,
        "general.alignment 48, which is no power of two",
    ),
    "other alignment": (
        lambda raw: put(raw, after(raw, b"general.alignment") + 4, "I", 4096),
        OSError,
        "tensor 'first' would end at byte",
    ),
    "one of several": (
        lambda raw: put(raw, after(raw, b"split.count") + 4, "H", 3),
        ValueError,
        "part 2 of a model in 3 files: join them first, with `llama-gguf-split",
    ),
    "more behind": (lambda raw: raw + b"x" * 64, OSError, "64 bytes behind its last tensor"),
    "last byte missing": (lambda raw: raw[: last_byte(raw)], OSError, "damaged or not whole"),
}


def last_byte(raw: bytes) -> int:
    """The end of the last tensor but one byte: what pads it is not needed."""
    return raw.rindex(np.arange(8, dtype=np.float16).tobytes()) + 15


@pytest.mark.parametrize("what", BAD)
def test_what_is_wrong_with_a_file_is_said(what: str, whole: bytes, tmp_path: Path) -> None:
    change, kind, words = BAD[what]
    file = tmp_path / "bad.gguf"
    file.write_bytes(change(whole))
    with pytest.raises(kind, match=words) as caught:
        ours.open_gguf(file)
    check_sentence(caught.value, file)


def check_sentence(problem: BaseException, file: Path) -> None:
    """One sentence, in one line, that names the file."""
    text = str(problem)
    assert text.startswith(f"{file} ")
    assert text.endswith(".")
    assert "\n" not in text
    assert len(text) < 400 + len(str(file))


def test_a_file_that_is_what_it_says_is_opened(whole: bytes, tmp_path: Path) -> None:
    file = tmp_path / "good.gguf"
    for content in (whole, whole[: last_byte(whole) + 1]):
        file.write_bytes(content)
        reader = ours.open_gguf(file)
        assert [tensor.name for tensor in reader.tensors] == ["first", "block", "final"]
        assert np.array_equal(reader.tensors[2].data, np.arange(8))
    found = ours.contents_of(str(file))
    assert found.metadata["tokenizer.ggml.tokens"] == ["a", "b", "é", "<s>"]
    assert found.metadata["tokenizer.ggml.scores"] == [0, 1, 2, 3]
    assert found.metadata["tokenizer.ggml.add_bos_token"] is True
    for mine, theirs in zip(found.tensors, reader.tensors, strict=True):
        assert mine.shape == tuple(theirs.shape)
        assert mine.kind == theirs.tensor_type
        assert mine.size == theirs.n_bytes
        assert mine.offset + found.start == theirs.data_offset


def test_paths_of_all_kinds(whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.gguf").write_bytes(whole)
    (tmp_path / "link").symlink_to("a.gguf")
    (tmp_path / "dead.gguf").symlink_to("gone.gguf")
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("~/a.gguf", tmp_path / "link"):
        assert len(ours.open_gguf(path).tensors) == 3
    for path, words in (
        (tmp_path, "is a folder"),
        (tmp_path / "none.gguf", "does not exist"),
        (tmp_path / "dead.gguf", "link to gone.gguf, which is not there"),
    ):
        with pytest.raises(FileNotFoundError, match=words):
            ours.open_gguf(path)
    for wrong in (3, None, b"a.gguf"):
        with pytest.raises(TypeError, match="give a string or path"):
            ours.open_gguf(wrong)


def changed(raw: bytes, seed: int) -> bytes:
    """A file that was cut, or in whose header and table bytes were changed."""
    draw = random.Random(seed)
    table = after(raw, b"final") + 24
    if seed % 3 == 0:
        return raw[: draw.randrange(len(raw))]
    new = bytearray(raw)
    for _ in range(draw.choice([1, 1, 2, 8])):
        at = draw.randrange(table)
        new[at] = draw.choice([0, 1, 0x7F, 0x80, 0xFF, new[at] ^ 1 << draw.randrange(8)])
    return bytes(new)


def test_no_change_leads_to_another_error(
    whole: bytes, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "changed.gguf"
    refused = 0
    for seed in range(600):
        file.write_bytes(changed(whole, seed))
        try:
            ours.open_gguf(file)
        except (OSError, ValueError) as problem:
            check_sentence(problem, file)
            refused += 1
    assert refused > 400
    assert capfd.readouterr() == ("", "")


def test_what_the_reader_raises_is_told(
    whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(whole)

    def broken(path: Path) -> None:
        raise RecursionError("maximum depth\n\nwas reached")

    monkeypatch.setattr(ours, "GGUFReader", broken)
    with pytest.raises(OSError, match=r"cannot be read as GGUF \(maximum depth\): get the file"):
        ours.open_gguf(file)
