"""Whatever is wrong in a model's files, an error names the file and the field."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from stored import configured, in_shards

import flocking

# In which file something is wrong, with what field, and what the error says of it.
FIELDS = {
    "config.json": {
        "hidden_act": ("nope", "KeyError: 'nope'"),
        "rms_norm_eps": ("1e-5", "expected float, got str"),
        "num_attention_heads": (3, "not a multiple"),
        "num_key_value_heads": (0, "whole number from 1 up"),
        "rope_parameters": ([1], "doesn't match"),
        "dtype": ("nope", "no attribute 'nope'"),
        "max_position_embeddings": ("256", "expected int, got str"),
        "pad_token_id": (-1000, "Padding_idx"),
        "id2label": ([1], "has no attribute 'items'"),
        "tie_word_embeddings": ("x", "expected bool"),
        "quantization_config": ([1], "has no attribute"),
        "sliding_window": ("x", "whole number"),
        "head_dim": (0, "ZeroDivisionError"),
        "attention_dropout": (float("nan"), "NaN"),
    },
    "generation_config.json": {
        "eos_token_id": ("x", "has to be a number"),
        "pad_token_id": ({}, "has to be a number"),
        "temperature": ("0.5", "has to be a number"),
        "max_length": ([1], "Field|has to be|cannot"),
        "num_beams": (10**30, "below 2"),
        "cache_implementation": ("nope", "Invalid"),
        "watermarking_config": ([1], "cannot be used"),
    },
    "tokenizer_config.json": {
        "tokenizer_class": (3, "removesuffix"),
        "bos_token": ([1], "has to be either"),
        "added_tokens_decoder": ([1], "items"),
        "auto_map": ([1], "list index out of range"),
        "padding_side": ("x", "between 'right' and 'left'"),
        "model_max_length": ("x", "not supported between"),
    },
    "tokenizer.json": {
        "version": ("9", "Unknown tokenizer version"),
        "post_processor": (3, "PostProcessorWrapper"),
    },
}


@pytest.mark.parametrize(
    ("file", "field"), [(file, field) for file, fields in FIELDS.items() for field in fields]
)
def test_the_file_and_the_field_are_named(file: str, field: str, folder: Path) -> None:
    value, why = FIELDS[file][field]
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | {field: value}))
    before = sorted(path.read_bytes() for path in folder.iterdir())
    with pytest.raises(ValueError, match=why) as caught:
        flocking.load(folder)
    message = str(caught.value)
    assert message.startswith(f"{folder / file}: {field} is ")
    assert "\n" not in message
    assert sorted(path.read_bytes() for path in folder.iterdir()) == before


def test_the_field_within_a_field_is_named(folder: Path) -> None:
    configured(folder, rope_parameters={"rope_theta": 1e4, "rope_type": "nope"})
    with pytest.raises(ValueError, match=r"config\.json: rope_parameters\.rope_type is 'nope', "):
        flocking.load(folder)


def test_of_two_faults_the_first_is_named(folder: Path) -> None:
    configured(folder, rms_norm_eps="x", id2label=[1])
    with pytest.raises(ValueError, match=r"config\.json: rms_norm_eps is 'x', which"):
        flocking.load(folder)


FILES = (
    *("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"),
    *("special_tokens_map.json", "added_tokens.json", "adapter_config.json"),
    "model.safetensors.index.json",
)
SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a mark": (
        lambda file: file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes()),
        "begins with a byte order mark",
    ),
    "empty": (lambda file: file.write_bytes(b""), r"is not JSON \(it is empty\): get it again"),
    "a list": (lambda file: file.write_bytes(b"[1]"), "has no JSON object in it: get it again"),
    "a number": (lambda file: file.write_bytes(b"3"), "has no JSON object in it: get it again"),
    "UTF-16": (lambda file: file.write_text("{}", "utf-16"), r"is not text in UTF-8 \(byte 0\)"),
    "a folder": (lambda file: file.unlink() or file.mkdir(), "is a folder: get it again"),
    "dangling": (
        lambda file: file.unlink() or file.symlink_to("../blobs/x"),
        r"is a link to \.\./blobs/x, which is not there: get that file again",
    ),
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("case", SPOILED)
def test_files_that_are_no_objects_are_named(file: str, case: str, folder: Path) -> None:
    if file == "model.safetensors.index.json":
        in_shards(folder)
    elif not (folder / file).exists():
        (folder / file).write_text("{}")
    spoil, match = SPOILED[case]
    spoil(folder / file)
    with pytest.raises((ValueError, OSError), match=match) as caught:
        flocking.load(folder)
    assert str(caught.value).startswith(f"{folder / file} ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{}", "has no weight_map"),
        ('{"weight_map": {}, "metadata": {}}', "has no weight_map"),
        ('{"weight_map": {"a": 3}, "metadata": {}}', "has no weight_map"),
        ('{"weight_map": {"a": "b"}}', "has no metadata"),
        ('{"weight_map": {"a": "b"}, "metadata": [1]}', "has no metadata"),
        ('{"weight_map": {"a": "b"}, "metadata": {}}', r"lacks 1 of 1 files .*\(b\)"),
    ],
)
def test_indices_of_nothing(name: str, content: str, match: str, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / f"{name}.index.json").write_text(content)
    with pytest.raises((ValueError, OSError), match=match) as caught:
        flocking.load(folder)
    assert str(folder) in str(caught.value)


def test_pickles_of_something_else(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save([1], folder / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"its weights \(pytorch_model\.bin\) cannot be read"):
        flocking.load(folder)
