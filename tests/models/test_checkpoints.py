"""Checkpoints that are not whole, not readable, or not there: a sentence, before what is slow."""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from helpers import ARCHITECTURES, build
from stored import configured, in_shards

import flocking
from flocking.models import checkpoints, folders

# --------------------------------------------------------------------------------------
# Whole or not


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_only_whole_models_are_loaded(
    name: str, tokenizer: tf.PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Weights that are tied are no fault, and neither are buffers."""
    model = build(name)
    if name == "bert":
        model = tf.BertLMHeadModel(tf.BertConfig(**model.config.to_dict() | {"is_decoder": True}))
    tokenizer.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    read, _ = flocking.load(tmp_path)
    for key, value in model.state_dict().items():
        assert torch.equal(read.state_dict()[key], value), key
    # Without its language modelling head, unless that is the embeddings.
    model.base_model.save_pretrained(tmp_path)
    if model.config.tie_word_embeddings and name != "bert":
        read, _ = flocking.load(tmp_path)
        for key, value in model.state_dict().items():
            assert torch.equal(read.state_dict()[key], value), key
    else:
        with pytest.raises(ValueError, match=r"weights that are in no file \((lm_head|cls)\."):
            flocking.load(tmp_path)


def without(folder: Path, *names: str) -> None:
    state = {key: value for key, value in build("llama").state_dict().items() if key not in names}
    build("llama").save_pretrained(folder, state_dict=state)


def test_a_missing_weight_is_named(folder: Path, capfd: pytest.CaptureFixture) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    without(folder, name)
    with pytest.raises(ValueError, match=rf"has 1 weights that are in no file \({name}\)"):
        flocking.load(folder)
    assert "LOAD REPORT" not in capfd.readouterr().err  # the sentence says it


def test_a_report_of_another_thread_is_not_taken(folder: Path) -> None:
    """It speaks of another model, and is that thread's to see."""
    logger, seen = logging.getLogger("transformers.modeling_utils"), []
    handler = logging.Handler()
    handler.emit = seen.append  # type: ignore[method-assign]
    logger.addHandler(handler)
    level = logger.level
    try:
        with checkpoints._reports() as reports:
            other = threading.Thread(target=logger.warning, args=("LOAD REPORT of another",))
            other.start()
            other.join()
            logger.warning("LOAD REPORT of this one")
    finally:
        logger.removeHandler(handler)
    assert reports == ["LOAD REPORT of this one"]
    assert [record.getMessage() for record in seen] == ["LOAD REPORT of another"]
    assert logger.level == level


def test_many_missing_weights_are_counted(folder: Path) -> None:
    configured(folder, num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"has 9 weights .*model\.layers\.2\..*, \.\.\.\)"):
        flocking.load(folder)


@pytest.mark.parametrize("options", [{}, {"ignore_mismatched_sizes": True}])
def test_weights_of_other_shapes_are_named(folder: Path, options: dict) -> None:
    configured(folder, vocab_size=130)
    with pytest.raises(ValueError, match=r"2 weights whose shapes.*embed_tokens\.weight"):
        flocking.load(folder, **options)


def test_weights_of_more_layers_are_warned_of(folder: Path) -> None:
    configured(folder, num_hidden_layers=1)
    with pytest.warns(UserWarning, match=r"9 weights of layers.*model\.layers\.1\..*fewer layers"):
        model, _ = flocking.load(folder)
    assert len(model.model.layers) == 1


def test_other_weights_may_be_left_over(folder: Path) -> None:
    model = build("llama")
    state = {**model.state_dict(), "vision_tower.weight": torch.zeros(3)}
    model.save_pretrained(folder, state_dict=state)
    flocking.load(folder)


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("verbosity", [tf.logging.WARNING, tf.logging.ERROR])
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, in PEFT
def test_an_adapters_base_has_to_be_whole(
    beside: bool, verbosity: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft = pytest.importorskip("peft")
    adapted = tmp_path / "adapted"
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(build("llama"), config)
    model.peft_config["default"].base_model_name_or_path = str(folder)
    shutil.copytree(folder, adapted)
    if not beside:
        (adapted / "config.json").unlink()
        (adapted / "model.safetensors").unlink()
    model.save_pretrained(adapted)
    read, _ = flocking.load(adapted)
    assert any("lora_A" in name for name, _ in read.named_parameters())
    without(adapted if beside else folder, "lm_head.weight")
    before = tf.logging.get_verbosity()
    tf.logging.set_verbosity(verbosity)
    try:
        with pytest.raises(ValueError, match=r"has 1 weights that are in no file \(lm_head\."):
            flocking.load(adapted)
        assert tf.logging.get_verbosity() == verbosity
    finally:
        tf.logging.set_verbosity(before)


def test_shards_and_pickles_are_read(folder: Path) -> None:
    """transformers reads the latter without running code in them."""
    in_shards(folder)
    first = flocking.load(folder)[0].state_dict()
    for file in folder.glob("model*"):
        file.unlink()
    torch.save(build("llama").state_dict(), folder / "pytorch_model.bin")
    second = flocking.load(folder)[0].state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


# --------------------------------------------------------------------------------------
# Readable or not


def write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def remove(*names: str) -> Callable[[Path], object]:
    return lambda folder: [(folder / name).unlink() for name in names]


def change(**changes: object) -> Callable[[Path], object]:
    return lambda folder: configured(folder, **changes)


def halve(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def pickled(content: bytes) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(content)

    return make


def half_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    torch.save(build("llama").state_dict(), file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def gguf_alone(folder: Path) -> None:
    emptied(folder)
    (folder / "model-q4.gguf").write_bytes(b"GGUF")


def a_bad_index(folder: Path) -> None:
    in_shards(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}')


SIZE = "has to be a whole number from 1 up"
UNREADABLE: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "no safetensors": (
        write("model.safetensors", b"nothing of the kind" * 9),
        OSError,
        r"model\.safetensors cannot be read .* get it again",
    ),
    "no bytes": (write("model.safetensors", b""), OSError, r"model\.safetensors cannot be read"),
    "a pointer": (
        write("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        OSError,
        r"model\.safetensors cannot be read .*git lfs pull",
    ),
    "half": (halve, OSError, r"model\.safetensors cannot be read"),
    "no weights": (remove("model.safetensors"), FileNotFoundError, "has no weights .*get them"),
    "a shard missing": (
        lambda folder: in_shards(folder)[0].unlink(),
        FileNotFoundError,
        r"lacks 1 of 5 files of its weights \(model-00001-of-00005\.safetensors\)",
    ),
    "a shard damaged": (
        lambda folder: in_shards(folder)[3].write_bytes(b"x"),
        OSError,
        r"model-00004-of-00005\.safetensors cannot be read",
    ),
    "a bad index": (a_bad_index, ValueError, r"index\.json has no weight_map"),
    "no pickle": (pickled(b"x"), OSError, r"weights \(pytorch_model\.bin\) cannot be read"),
    "half a pickle": (half_a_pickle, OSError, r"weights \(pytorch_model\.bin\) cannot be read"),
    "config not JSON": (write("config.json", b"{x"), ValueError, r"config\.json is not JSON"),
    "config not text": (write("config.json", b"\xff\xfe\0"), ValueError, r"config\.json is not"),
    "config a list": (write("config.json", b"[1]"), ValueError, "no JSON object"),
    "config too deep": (write("config.json", b"[" * 10**5), ValueError, "is not JSON"),
    "no config": (remove("config.json"), FileNotFoundError, "has no config.json, only"),
    "empty": (emptied, FileNotFoundError, "is empty: give a folder"),
    "GGUF alone": (
        gguf_alone,
        FileNotFoundError,
        r"give such a file itself, as in .*model-q4\.gguf",
    ),
    "negative": (change(intermediate_size=-1), ValueError, f"intermediate_size is -1: it {SIZE}"),
    "zero": (change(hidden_size=0), ValueError, f"hidden_size is 0: it {SIZE}"),
    "no layers": (change(num_hidden_layers=0), ValueError, f"num_hidden_layers is 0: it {SIZE}"),
    "no heads": (change(num_attention_heads=0), ValueError, f"heads is 0: it {SIZE}"),
    "text": (change(hidden_size="64"), ValueError, f"hidden_size is '64': it {SIZE}"),
    "a fraction": (change(hidden_size=64.5), ValueError, f"hidden_size is 64.5: it {SIZE}"),
    "true": (change(vocab_size=True), ValueError, f"vocab_size is True: it {SIZE}"),
    "nothing": (change(hidden_size=None), ValueError, r"config\.json: hidden_size is None, which"),
    "odd heads": (change(head_dim="x"), ValueError, r"config\.json: head_dim is 'x', which cannot"),
    "missing": (change(num_hidden_layers="left out"), ValueError, "sizes are missing in it"),
    "layers": (change(num_hidden_layers=10**12), ValueError, "no model has more than 10,000"),
    "many layers": (change(num_hidden_layers=500), ValueError, "a model of .* the files hold"),
    "d_ff": (change(intermediate_size=10**12), ValueError, "a model of .* the files hold"),
    "hidden": (change(hidden_size=10**6), ValueError, "a model of .* the files hold"),
    "overflow": (change(hidden_size=10**12), ValueError, r"config\.json"),
    "vocabulary": (change(vocab_size=10**12), ValueError, "a model of .* the files hold"),
    "endless": (change(vocab_size=10**30), ValueError, r"config\.json: vocab_size is 10000000000"),
    "unknown kind": (change(model_type="x"), ValueError, "model type `x`.*newer transformers"),
    "no kind": (change(model_type="left out"), ValueError, "has no model_type"),
    "no causal one": (change(model_type="t5"), ValueError, r"T5Config.*newer transformers"),
    "kind a list": (change(model_type=[1]), ValueError, "has no model_type"),
    "tokenizer not JSON": (
        write("tokenizer.json", b"{x"),
        ValueError,
        r"tokenizer\.json is not JSON",
    ),
    "no tokenizer": (
        remove("tokenizer.json", "tokenizer_config.json"),
        FileNotFoundError,
        r"has no tokenizer: save it there with tokenizer\.save_pretrained",
    ),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_cannot_be_read_is_told_in_a_sentence(case: str, folder: Path) -> None:
    spoil, kind, match = UNREADABLE[case]
    spoil(folder)
    with pytest.raises(kind, match=match) as caught:
        flocking.load(folder)
    message = str(caught.value)
    assert str(folder) in message
    assert "\n" not in message
    assert len(message) < 250 + 2 * len(str(folder))


@pytest.mark.parametrize("cached", [False, True])
def test_more_than_all_memory_is_refused(
    cached: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is read, also for a hub id whose config is in the cache."""
    name, options = str(folder), {}
    if cached:
        repository = tmp_path / "cache" / "models--some--model"
        snapshot = repository / "snapshots" / ("0" * 40)
        shutil.copytree(folder, snapshot)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0" * 40)
        name, options = "some/model", {"cache_dir": tmp_path / "cache", "local_files_only": True}
    there = sum(p.numel() for p in build("llama").parameters()) * 4
    monkeypatch.setattr(folders.psutil, "swap_memory", lambda: SimpleNamespace(total=0))
    for total, dtypes in ((there, ["float32"]), (there - 1, ["bfloat16", torch.float16])):
        memory = SimpleNamespace(total=total, available=total)
        monkeypatch.setattr(folders.psutil, "virtual_memory", lambda memory=memory: memory)
        for dtype in dtypes:
            flocking.load(name, dtype=dtype, **options)
    with pytest.raises(MemoryError, match=r"config\.json describes a model that takes 0 GiB"):
        flocking.load(name, **options)
    if cached:
        configured(snapshot, intermediate_size=10**12)
        with pytest.raises(
            MemoryError, match=r"config\.json describes a model that takes 1,430,511 GiB"
        ):
            flocking.load(name, **options)
        configured(snapshot, intermediate_size=-1)
        with pytest.raises(ValueError, match=r"intermediate_size is -1: it has to be"):
            flocking.load(name, **options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"device_map": "meta"}, "device_map names the device meta, which holds no values"),
        ({"device_map": torch.device("meta")}, "device_map names the device meta"),
        ({"device_map": {"": "meta:0"}}, "device_map names the device meta"),
        ({"dtype": "nope"}, "dtype='nope': give float32, bfloat16 or float16"),
        ({"torch_dtype": "float31"}, "torch_dtype='float31': give float32"),
    ],
)
def test_places_and_dtypes_that_there_are_not(options: dict, match: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=match):
        flocking.load(folder, **options)


def test_a_tilde_is_the_users_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert flocking.load("~/model")[0].name_or_path == str(folder)
    assert flocking.load(Path("~/model"))[0].name_or_path == str(folder)
    with pytest.raises(FileNotFoundError, match=rf"model {folder.parent}/none: there is no such"):
        flocking.load("~/none")
    (folder.parent / "link").symlink_to("nowhere")
    with pytest.raises(FileNotFoundError, match="link is a link to nowhere, which is not there"):
        flocking.load("~/link")
    monkeypatch.chdir(folder.parent)
    shutil.copytree(folder, "~/model")  # a folder of that very name comes first
    assert flocking.load("~/model")[0].name_or_path == "~/model"


@pytest.mark.parametrize(
    ("name", "kind", "match"),
    [
        ("{}/none", FileNotFoundError, "there is no such folder, and this is not a hub id"),
        ("./none/of/it", FileNotFoundError, "there is no such folder"),
        ("", FileNotFoundError, "there is no such folder"),
        ("two words", FileNotFoundError, "there is no such folder"),
        ("/" + "x" * 300, FileNotFoundError, "there is no such folder"),
        ("a\0b", FileNotFoundError, "there is no such folder"),
        ("{}/config.json", NotADirectoryError, "is a file: give the folder that it is in"),
        ("some/model", OSError, "is no folder here, and the Hugging Face hub cannot be reached"),
        ("gpt2", OSError, "is no folder here, and the Hugging Face hub cannot be reached"),
        (3, TypeError, "the model's name is a int"),
        (b"gpt2", TypeError, "the model's name is a bytes"),
        (["gpt2"], TypeError, "the model's name is a list"),
    ],
)
def test_names_of_nothing(
    name: object, kind: type[Exception], match: str, whole: Path, capfd: pytest.CaptureFixture
) -> None:
    given = name.format(whole) if isinstance(name, str) else name
    for ask in (flocking.load, flocking.models.identity):
        with pytest.raises(kind, match=match):
            ask(given)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("problem", "kind", "match"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), MemoryError, "dtype='bfloat16'"),
        (MemoryError(), MemoryError, "does not fit in memory"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            MemoryError,
            "does not fit in memory",
        ),
        (RuntimeError("first thing.\nsecond thing"), ValueError, "cannot be loaded: first thing"),
        (KeyboardInterrupt(), KeyboardInterrupt, "^$"),
    ],
)
def test_what_goes_wrong_while_weights_are_read(
    problem: BaseException,
    kind: type[BaseException],
    match: str,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise problem

    monkeypatch.setattr(tf.LlamaForCausalLM, "from_pretrained", fail)
    with pytest.raises(kind, match=match):
        flocking.load(whole)


def test_an_unknown_argument_is_a_type_error(whole: Path) -> None:
    with pytest.raises(TypeError, match="no_such_argument"):
        flocking.load(whole, no_such_argument=1)


def test_the_hub_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it does not answer, nothing is tried again and again, and the cache alone is read."""
    seen = []

    def from_pretrained(name: str, **kwargs: object) -> None:
        seen.append(kwargs)
        raise OSError("We couldn't connect to 'https://huggingface.co'")

    monkeypatch.setattr(checkpoints.AutoTokenizer, "from_pretrained", from_pretrained)
    monkeypatch.setattr(checkpoints, "hub_answers", lambda: False)
    with pytest.raises(OSError, match="cannot be reached"):
        flocking.load("some/model")
    monkeypatch.setattr(checkpoints, "hub_answers", lambda: True)
    with pytest.raises(OSError, match="cannot be reached"):
        flocking.load("some/model")
    assert [kwargs.get("local_files_only") for kwargs in seen] == [True, None]
