"""Reading models, configs and tokenizers: whole, without a stranger's code, or with a clear error.

All of the package's calls of ``from_pretrained`` are here, but for those of lm-eval.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from flocking.models.devices import check_places
from flocking.models.folders import check_config, check_folder, other_shapes
from flocking.models.notices import warn
from flocking.models.problems import UnexplainedError, listed, of_suspect, reading, told
from flocking.models.suspects import find_suspect
from flocking.texts import dangling, expanded

# Where the files are: arguments for the model that its config and tokenizer need too.
PLACE = ("revision", "subfolder", "cache_dir", "local_files_only", "token")
# What is remembered of a model, for the tokenizer that is looked for beside it later. A token is
# a secret, and the revision is in the config.
_REMEMBERED = ("subfolder", "cache_dir", "local_files_only", "trust_remote_code")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_logging = threading.RLock()  # the level of transformers' log belongs to all threads
# A row of transformers' reports, with or without colours.
_MISSING = r"^(\S+)\s*\|[^\w|]*(?:\[\d+m)?MISSING"
# What a tokenizer is read from; it can do without the first ones.
_TOKENIZER_FILES = (
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer_config.json",
    "config.json",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
# Seconds to wait for an answer of the hub.
_PATIENCE = 5


def prepared(auto: Any, name: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for :func:`read_model`, once all is looked at that can be before weights are read.

    Raises
    ------
    OSError, ValueError
        As :func:`read_model`.
    """
    full = _with_defaults(name, kwargs)
    check_places(name, full)
    if os.path.isdir(name):
        check_folder(Path(name), auto, full)
    elif (cached := _config_of_hub(name, full)) is not None:
        check_config(cached, auto, full)
    return full


def read_model(auto: Any, name: str, *, exact: bool = False, **kwargs: Any) -> PreTrainedModel:
    """What ``auto.from_pretrained`` gives, if all of its weights are in the files.

    Parameters
    ----------
    auto : type
        Such as ``AutoModelForCausalLM``.
    name : str
        A folder or hub id.
    exact : bool
        Refuse files with any weight that the model does not have.
    **kwargs
        Of ``from_pretrained``.

    Raises
    ------
    OSError
        If there is no such model, it cannot be read, or (FileNotFoundError) files are missing.
    ValueError
        If weights are missing or of other shapes, the config describes no model that fits them,
        or the folder needs code that comes with it and ``trust_remote_code=True`` is not given.
    MemoryError
        If it does not fit in memory.
    """
    kwargs = _with_defaults(name, kwargs)
    trust = kwargs.pop("trust_remote_code")
    kwargs["output_loading_info"] = True
    if kwargs.get("local_files_only"):  # which transformers does not tell its search for adapters
        kwargs["adapter_kwargs"] = {
            **(kwargs.get("adapter_kwargs") or {}),
            "local_files_only": True,
        }
    try:
        with reading(name), _reports() as reports:
            model, info = auto.from_pretrained(name, trust_remote_code=trust, **kwargs)
    except ValueError as problem:
        # transformers names them in its log alone.
        described = (Path(name) / "config.json").is_file()
        if "ignore_mismatched_sizes" in str(problem) and described:
            _refuse(name, "whose shapes in the files are others", other_shapes(Path(name), auto))
        raise
    _refuse_incomplete(name, info)
    # With an adapter, `info` is of the adapter alone, and a report says what its base lacks.
    _refuse(name, "that are in no file", re.findall(_MISSING, "\n".join(reports), re.MULTILINE))
    if exact and info["unexpected_keys"]:
        raise ValueError(
            f"{name}: the files have weights that the model does not have "
            f"({listed(sorted(info['unexpected_keys']))})."
        )
    _warn_of_left_over(name, model, info)
    said = {**kwargs, "trust_remote_code": trust}
    # Of the model of this name: who gives it another one speaks of other files.
    remembered = {key: said[key] for key in _REMEMBERED if key in said}
    vars(model)["said_when_loaded"] = (model.name_or_path, remembered)
    if os.path.isdir(name):  # a relative name means another folder from another one
        vars(model)["folder_when_loaded"] = (model.name_or_path, os.path.abspath(name))
    return model


def read_config(name: str, **kwargs: Any) -> PreTrainedConfig:
    """The config in a folder, without a stranger's code.

    Raises
    ------
    OSError, ValueError
        As :func:`read_model`.
    """
    with reading(name):
        return AutoConfig.from_pretrained(name, trust_remote_code=False, **kwargs)


def read_tokenizer(name: str, **kwargs: Any) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder or hub repository.

    Raises
    ------
    OSError, ValueError
        As :func:`read_model`.
    """
    kwargs = _with_defaults(name, kwargs)
    trust = kwargs.pop("trust_remote_code")

    def read(place: object) -> Any:
        found = AutoTokenizer.from_pretrained(place, trust_remote_code=trust, **kwargs)
        found("a")  # what is wrong with some comes up no earlier
        return found

    try:
        with reading(name, "tokenizer"):
            return read(name)
    except UnexplainedError as error:
        problem = error.__cause__
        # (Code in a folder is not run again and again to find out.)
        if not os.path.isdir(name) or trust or kwargs.get("subfolder"):
            raise
        found = find_suspect(Path(name), _TOKENIZER_FILES, read)
        if found is None or not isinstance(problem, Exception):
            raise
        raise of_suspect(name, found, problem) from problem


def commit_of(name: str) -> str | None:
    """The commit of a hub id, without running code that is in it."""
    kwargs = _with_defaults(name, {})
    kwargs.pop("trust_remote_code")  # a dict is read here, and no class is looked for
    with reading(name):
        content, _ = PreTrainedConfig.get_config_dict(name, **kwargs)
    return content.get("_commit_hash")


def place_of(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a model that its tokenizer needs too."""
    return {key: kwargs[key] for key in (*PLACE, "trust_remote_code") if key in kwargs}


def said_of(model: PreTrainedModel) -> dict[str, Any]:
    """What the user said of a model when :func:`read_model` read it; copies of it have it too."""
    name, said = vars(model).get("said_when_loaded", ("", {}))
    return dict(said) if name == model.name_or_path else {}


def folder_of(model: PreTrainedModel) -> Path | None:
    """The folder that a model was read from, if it is still there and known for certain.

    It is not where the model has a relative name that :func:`read_model` did not see.
    """
    given = str(getattr(model, "name_or_path", None) or "")
    name, folder = vars(model).get("folder_when_loaded", ("", ""))
    found = folder if name == given else given
    return Path(found) if os.path.isabs(found) and os.path.isdir(found) else None


def trusted(value: object) -> bool:
    """Whether the user said that code in a model's folder may run.

    transformers asks on standard input where nothing is said, and takes any text for a yes.
    """
    if value is None or value is False:
        return False
    if value is True:
        return True
    raise TypeError(f"trust_remote_code={value!r}: give True or False.")


def located(name: object) -> str:
    """A folder's path or a hub id.

    Raises
    ------
    TypeError
        If it is neither a string nor a path.
    OSError
        If there is no such folder, and it cannot be a hub id.
    """
    text = path_of(name)
    if os.path.isdir(text):
        return text
    if os.path.isfile(text):
        raise NotADirectoryError(
            f"{text} is a file: give the folder that it is in, or a GGUF file."
        )
    if text and (why := dangling(text)):
        raise FileNotFoundError(f"model {text} {why}: give a model's folder.")
    if text.endswith(".gguf"):
        raise FileNotFoundError(f"model {text}: there is no such file: give a GGUF file.")
    if not _HUB_ID.fullmatch(text) or text.endswith((".", "-")):
        raise FileNotFoundError(
            f"model {text or repr(text)}: there is no such folder, and this is not a hub id: give "
            "a model's folder or a name such as HuggingFaceTB/SmolLM2-135M."
        )
    return text


def path_of(name: object) -> str:
    """A model's name as text, with the user's folder in place of ``~``.

    Raises
    ------
    TypeError
        If it is neither a string nor a path.
    """
    if not isinstance(name, str | os.PathLike) or not isinstance(text := os.fspath(name), str):
        raise TypeError(
            f"the model's name is a {type(name).__name__}: give a folder, a GGUF file or a hub id."
        )
    return expanded(text)


def gguf_in(name: str, file: object, kwargs: Mapping[str, Any]) -> Path:
    """A GGUF file in a folder or hub repository, from which it is downloaded.

    Parameters
    ----------
    name : str
        A folder or hub id.
    file : str
        As ``gguf_file`` of ``from_pretrained``.
    kwargs : dict
        Others of its arguments, which say where in the repository the file is.

    Raises
    ------
    OSError
        If there is no such file, or the hub cannot be reached.
    TypeError
        If `file` is neither a string nor a path.
    """
    if not isinstance(file, str | os.PathLike) or not isinstance(text := os.fspath(file), str):
        raise TypeError(f"gguf_file is a {type(file).__name__}: give the name of a GGUF file.")
    if os.path.isdir(name):
        place = Path(name) / (kwargs.get("subfolder") or "") / text
        if not place.is_file():
            raise FileNotFoundError(f"{place.parent} has no file {place.name}.")
        return place
    full = _with_defaults(name, kwargs)
    given = {key: full[key] for key in PLACE if full.get(key) is not None}
    try:
        return Path(huggingface_hub.hf_hub_download(name, text, **given))
    except Exception as problem:  # of whichever HTTP library it uses
        raise told(name, "model", OSError(str(problem))) from problem


def hub_answers() -> bool:
    """Whether the hub can be reached: asking once is quicker than all retries of a download."""
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=_PATIENCE)
    except Exception:  # of whichever HTTP library it uses
        return False
    return True


def _with_defaults(name: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments with a plain yes or no to foreign code, and no retries without a network."""
    full = {**kwargs, "trust_remote_code": trusted(kwargs.get("trust_remote_code"))}
    located(name)
    if not os.path.isdir(name) and not full.get("local_files_only") and not hub_answers():
        full["local_files_only"] = True
    return full


def _config_of_hub(name: str, kwargs: Mapping[str, Any]) -> Path | None:
    """A folder of the cache with a hub id's config in it; None where it cannot be had.

    What is wrong then is for ``from_pretrained`` to say.
    """
    if kwargs.get("config") is not None:
        return None
    place = {key: kwargs[key] for key in PLACE if kwargs.get(key) is not None}
    subfolder = place.pop("subfolder", "")
    try:
        folder = huggingface_hub.snapshot_download(
            name, allow_patterns=f"{subfolder}/config.json".lstrip("/"), **place
        )
    except Exception:
        return None
    found = Path(folder) / subfolder
    return found if (found / "config.json").is_file() else None


@contextmanager
def _reports() -> Iterator[list[str]]:
    """Take transformers' tables of missing weights out of its log: an error says it shorter."""
    logger = logging.getLogger("transformers.modeling_utils")
    reports: list[str] = []
    own = threading.get_ident()
    with _logging:
        level, least = logger.level, logger.getEffectiveLevel()

        def keep(record: logging.LogRecord) -> bool:
            report = record.thread == own and "LOAD REPORT" in record.getMessage()
            if report:
                reports.append(record.getMessage())
            return not report and record.levelno >= least

        # (At WARNING itself, transformers would go through a plan to spread the model over
        # devices.)
        logger.setLevel(min(least, logging.WARNING - 1))
        logger.addFilter(keep)
        try:
            yield reports
        finally:
            logger.removeFilter(keep)
            logger.setLevel(level)


def _refuse_incomplete(name: str, info: Mapping[str, Any]) -> None:
    """Refuse weights that transformers made up."""
    mismatched = sorted(key if isinstance(key, str) else key[0] for key in info["mismatched_keys"])
    _refuse(name, "that are in no file", sorted(info["missing_keys"]))
    _refuse(name, "whose shapes in the files are others", mismatched)
    if info.get("error_msgs"):
        raise ValueError(f"{name}: weights cannot be read ({listed(info['error_msgs'])}).")


def _refuse(name: str, what: str, weights: list[str]) -> None:
    if weights:
        raise ValueError(
            f"{name}: the model has {len(weights)} weights {what} ({listed(weights)}), which would "
            "be random: give a checkpoint of the whole model, its language modelling head "
            "included, and the config.json that belongs to it. (An encoder without a head can be "
            "loaded with transformers.AutoModel.from_pretrained, and that model recorded.)"
        )


def _warn_of_left_over(name: str, model: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """Warn where the files have more layers than the model; other heads or towers are common."""

    def numberless(key: str) -> str:
        return re.sub(r"\.\d+\.", ".N.", key)

    there = {numberless(key) for key, _ in model.named_parameters()}
    more = sorted(key for key in info["unexpected_keys"] if numberless(key) in there)
    if more:
        warn(
            f"{name} has {len(more)} weights of layers that the model does not have "
            f"({listed(more)}): its config says fewer layers than there are."
        )
