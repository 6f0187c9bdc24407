"""What an evaluation asks: tasks, methods at densities, and the settings of each task."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from lm_eval.api.metrics import mean
from lm_eval.api.task import Task

from flocking.evaluation.domain import refuse_none_left
from flocking.evaluation.protocols import AUTHORS, MOST_ITEMS, rouge_scorer
from flocking.evaluation.tasks import Articles, find
from flocking.evaluation.variants import Variant, variants_of
from flocking.pruning import DRAWN, Protocol

_OF_LIKELIHOODS = ("context", "last-token")
_PROTOCOLS = (*_OF_LIKELIHOODS, *AUTHORS)
_T = TypeVar("_T")


@dataclass(frozen=True)
class Question:
    """A task with its settings.

    Attributes
    ----------
    name : str
    task : lm_eval.api.task.Task or Articles
    protocol : {"context", "last-token", "authors", "authors-greedy"}
    limit : int, optional
        How many items, the first ones.
    """

    name: str
    task: Task | Articles
    protocol: str
    limit: int | None

    @property
    def of_likelihoods(self) -> Protocol:
        """How likelihoods are asked: the authors' way is "last-token"."""
        return "context" if self.protocol == "context" else "last-token"

    @property
    def authors(self) -> bool:
        """Whether it is asked as GRIFFIN's authors do."""
        return self.protocol in AUTHORS

    @property
    def generates(self) -> bool:
        """Whether answers are texts that the model writes."""
        return not isinstance(self.task, Articles) and self.task.OUTPUT_TYPE == "generate_until"

    def digest(self) -> str:
        """SHA-256 of definition, documents and protocol, whatever the model and the limit."""
        if isinstance(self.task, Articles):
            asked: Any = [self.task.texts, self.task.prompt_length]
        else:
            asked = [definition_of(self.task), list(self.task.eval_docs), *self._shown()]
        return digest_of([asked, self.protocol])

    def _shown(self) -> list[Any]:
        """Documents of another split that are shown before the items, if there are any."""
        assert not isinstance(self.task, Articles)
        config = self.task.config
        same = config.fewshot_split is not None and config.fewshot_split == config.test_split
        return [list(self.task.fewshot_docs())] if config.num_fewshot and not same else []


def digest_of(asked: Any) -> str:
    """SHA-256 of definitions of tasks and what comes with them."""
    return hashlib.sha256(json.dumps(asked, default=_plain).encode()).hexdigest()


def definition_of(task: Task) -> dict[str, Any]:
    """A task's definition, for :func:`digest_of`."""
    return task.config.to_dict(keep_callable=True)


def _plain(value: Any) -> str:
    """What JSON has no word for: functions by their code, this package's by their names.

    (The code of this package is another part of a key.)
    """
    name = str(getattr(value, "__qualname__", value))
    if callable(value) and not str(getattr(value, "__module__", "")).startswith("flocking."):
        with contextlib.suppress(OSError, TypeError):  # it has no source, as a partial has none
            return inspect.getsource(value)
    return re.sub(r" at 0x[0-9a-f]+", "", name)  # an address differs from process to process


@dataclass(frozen=True)
class Plan:
    """What an evaluation asks.

    Attributes
    ----------
    tasks : list of str
        See :func:`flocking.evaluation.tasks.find`.
    methods : list of str
        Of :func:`flocking.griffin`, at each of `densities`, or at one density as in "topk@0.25";
        "static-domain", static from each task's own documents beyond those that are scored;
        "refreshed-64", "topk" that selects anew after every 64 new tokens; "shared-4", "topk" with
        one selection for each four prompts, of tasks that generate. The full model always comes
        first.
    densities : list of float
    protocol : {"context", "last-token", "authors", "authors-greedy"} or dict of str to str
        Of likelihoods, as in :func:`flocking.score`; by task or group, with ``""`` for the others.
        With "context", answers of one token are the full model's own. "authors" is for all tasks:
        see :mod:`flocking.evaluation.authors`.
    limit : int or dict of str to int, optional
        How many items of each task, the first ones; by task or group, with ``""`` for the others.
        All by default; 1,000 of summaries in the authors' protocol.
    data_dir : path, optional
        Folder with the documents as JSON lines; the hub by default.
    calibration : path or list of str, optional
        See :class:`flocking.evaluation.harness.GriffinLM`.
    seed : int
        Of the methods that draw.

    Raises
    ------
    ValueError
        For an unknown method or protocol, a density or limit that is out of range, or a calibration
        or seed that no method uses.
    """

    tasks: Sequence[str]
    methods: Sequence[str] = ("topk",)
    densities: Sequence[float] = (0.5,)
    protocol: str | Mapping[str, str] = "context"
    limit: int | Mapping[str, int] | None = None
    data_dir: str | Path | None = None
    calibration: str | Path | Sequence[str] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be asked, before a model is loaded."""
        variants = variants_of(self.methods, self.densities)
        twins = [variant.twinned for variant in variants]
        if self.calibration is not None and not any(
            twin.needs_texts and not twin.of_domain for twin in twins
        ):
            raise ValueError(
                f"calibration={_few(self.calibration)}: none of {', '.join(self.methods)} is made "
                "from it: leave it out, or ask static or global-local."
            )
        if self.seed and not any(twin.draws for twin in twins):
            raise ValueError(
                f"seed={self.seed}: none of {', '.join(self.methods)} draws: leave it out, or ask "
                f"{', '.join(DRAWN)}."
            )
        if self.limit is not None and (low := min(_values(self.limit), default=1)) < 1:
            raise ValueError(f"limit={low}: give 1 item or more.")
        given = set(_values(self.protocol))
        if odd := given - set(_PROTOCOLS):
            raise ValueError(f"protocol={odd.pop()!r}: choose from {', '.join(_PROTOCOLS)}.")
        if (self.authors and len(given) > 1) or (_names(self.protocol) and given & set(AUTHORS)):
            raise ValueError("the authors' protocol is for all tasks: give no other beside it.")
        shared = [variant.method for variant in variants if variant.twinned.texts > 1]
        if self.authors and shared:
            raise ValueError(
                f"the authors' protocol runs one prompt at a time: leave out {shared[0]}."
            )

    @property
    def authors(self) -> bool:
        """Whether all is asked as GRIFFIN's authors do."""
        return bool(set(_values(self.protocol)) & set(AUTHORS))

    @property
    def variants(self) -> list[Variant]:
        """The full model, and each method at each of its densities."""
        return variants_of(self.methods, self.densities)

    def questions(self) -> list[Question]:
        """The tasks with their documents and settings, which are read once.

        Raises
        ------
        ValueError
            For an unknown task, documents that cannot be read, settings for a task that is not
            asked, "static-domain" where all documents of a task are scored, or "shared-N" where no
            task generates.
        """
        return self._questions

    @functools.cached_property
    def _questions(self) -> list[Question]:
        if self.authors:
            rouge_scorer()
        data_dir = None if self.data_dir is None else Path(self.data_dir)
        groups = {name: find([name], data_dir, self.authors) for name in self.tasks}
        found = {name: group for group, members in groups.items() for name in members}
        for name in {*_names(self.protocol), *_names(self.limit)} - {*groups, *found}:
            raise ValueError(
                f"{name} has a limit or protocol and is not one of the tasks: {', '.join(found)}."
            )
        asked = [self._question(name, groups[group][name], group) for name, group in found.items()]
        shared = [variant for variant in self.variants if variant.twinned.texts > 1]
        if shared and not any(question.generates for question in asked):
            raise ValueError(
                f"{shared[0].method} is for tasks that generate, and none of these does "
                f"({', '.join(found)}): leave it out, or add a task such as xsum."
            )
        if any(variant.twinned.of_domain for variant in self.variants):
            for question in asked:
                refuse_none_left(question.name, question.task, question.limit)
        return asked

    def _question(self, name: str, task: Task | Articles, group: str) -> Question:
        if not isinstance(task, Articles):
            _refuse_uncomparable(name, task)
        limit = None if self.limit is None else _of_task(self.limit, name, group)
        asked = Question(name, task, _of_task(self.protocol, name, group) or "context", limit)
        if asked.authors:
            return replace(asked, limit=limit or MOST_ITEMS) if asked.generates else asked
        if isinstance(task, Articles) or asked.generates:
            # A prompt is continued, whatever the protocol of likelihoods.
            return replace(asked, protocol="context")
        return asked


def _few(texts: str | Path | Sequence[str]) -> str:
    """A path, or how many texts there are."""
    return str(texts) if isinstance(texts, str | Path) else f"{len(texts)} texts"


def _refuse_uncomparable(name: str, task: Task) -> None:
    """Refuse a task whose answers cannot be compared item by item, or that runs them as code."""
    if getattr(task, "UNSAFE_CODE", False):
        raise ValueError(
            f"{name} runs code that the model writes, which is not done here: run it with "
            "flocking lm-eval --confirm_run_unsafe_code, or leave it out."
        )
    why = ""
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        why = "asks for the likelihood of a whole text, which has no prompt to select neurons from"
    elif not any(how is mean for how in task.aggregation().values()):
        why = f"has no metric that is a mean over items ({', '.join(sorted(task.aggregation()))})"
    elif task.OUTPUT_TYPE == "generate_until" and _samples(task.config.generation_kwargs):
        why = "draws its answers at random"
    if why:
        raise ValueError(
            f"{name} {why}, so that methods cannot be compared on it item by item: run it with "
            "flocking lm-eval, or leave it out."
        )


def _samples(options: Mapping[str, Any] | None) -> bool:
    return bool((options or {}).get("do_sample"))


def _values(setting: _T | Mapping[str, _T]) -> list[_T]:
    return list(setting.values()) if isinstance(setting, Mapping) else [setting]


def _names(setting: object) -> list[str]:
    return [name for name in setting if name] if isinstance(setting, Mapping) else []


def _of_task(setting: _T | Mapping[str, _T], name: str, group: str) -> _T | None:
    """The task's own setting, its group's, or that of all others, whose name is empty."""
    if not isinstance(setting, Mapping):
        return setting
    return setting.get(name, setting.get(group, setting.get("")))
