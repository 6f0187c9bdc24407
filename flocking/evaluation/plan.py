"""What an evaluation asks: tasks, methods at densities, and the settings of each task."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from lm_eval.api.task import Task

from flocking.evaluation.domain import OF_DOMAIN, refuse_none_left
from flocking.evaluation.harness import CHOICES
from flocking.evaluation.summary import label
from flocking.evaluation.tasks import Articles, find
from flocking.pruning import Protocol

_PROTOCOLS = ("context", "last-token")
_T = TypeVar("_T")


class Variant(NamedTuple):
    """A method at a density."""

    method: str
    density: float

    def __str__(self) -> str:
        """As it is written in a plan."""
        return label(*self)


FULL = Variant("full", 1.0)


@dataclass(frozen=True)
class Question:
    """A task with its settings.

    Attributes
    ----------
    name : str
    task : lm_eval.api.task.Task or Articles
    protocol : {"context", "last-token"}
    limit : int, optional
        How many items, the first ones.
    """

    name: str
    task: Task | Articles
    protocol: Protocol
    limit: int | None

    def digest(self) -> str:
        """SHA-256 of what is asked: the task's definition, documents and settings."""
        if isinstance(self.task, Articles):
            asked: Any = [self.task.texts, self.task.prompt_length]
        else:
            # Examples shown before the items are drawn from all documents.
            shown = self.limit if not self.task.config.num_fewshot else None
            asked = [self.task.dump_config(), list(self.task.eval_docs)[:shown], *self._shown()]
        # A function's address differs from process to process, its name does not.
        text = json.dumps(
            [asked, self.protocol, self.limit], default=lambda x: getattr(x, "__qualname__", str(x))
        )
        return hashlib.sha256(text.encode()).hexdigest()

    def _shown(self) -> list[Any]:
        """Documents of another split that are shown before the items, if there are any."""
        assert not isinstance(self.task, Articles)
        config = self.task.config
        same = config.fewshot_split is not None and config.fewshot_split == config.test_split
        return [list(self.task.fewshot_docs())] if config.num_fewshot and not same else []


@dataclass(frozen=True)
class Plan:
    """What an evaluation asks.

    Attributes
    ----------
    tasks : list of str
        See :func:`flocking.evaluation.tasks.find`.
    methods : list of str
        Of :func:`flocking.griffin`, at each of `densities`, or at one density as in "topk@0.25";
        or "static-domain", static from each task's own documents beyond those that are scored.
        The full model always comes first.
    densities : list of float
    protocol : {"context", "last-token"} or dict of str to str
        Of likelihoods, as in :func:`flocking.score`; by task or group, with ``""`` for the others.
        With "context", answers of one token are the full model's own.
    limit : int or dict of str to int, optional
        How many items of each task, the first ones; by task or group, with ``""`` for the others.
    data_dir : path, optional
        Folder with the documents as JSON lines; the hub by default.
    calibration : path or list of str, optional
        See :class:`flocking.evaluation.harness.GriffinLM`.
    seed : int
        Of the methods that draw.

    Raises
    ------
    ValueError
        For an unknown method or protocol, or a density or limit that is out of range.
    """

    tasks: Sequence[str]
    methods: Sequence[str] = ("topk",)
    densities: Sequence[float] = (0.5,)
    protocol: Protocol | Mapping[str, Protocol] = "context"
    limit: int | Mapping[str, int] | None = None
    data_dir: str | Path | None = None
    calibration: str | Path | Sequence[str] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be asked, before a model is loaded."""
        variants_of(self.methods, self.densities)
        if self.limit is not None and (low := min(_values(self.limit), default=1)) < 1:
            raise ValueError(f"limit={low}: give 1 item or more.")
        if odd := set(_values(self.protocol)) - set(_PROTOCOLS):
            raise ValueError(f"protocol={odd.pop()!r}: give 'context' or 'last-token'.")

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
            asked, or "static-domain" where all documents of a task are scored.
        """
        return self._questions

    @functools.cached_property
    def _questions(self) -> list[Question]:
        data_dir = None if self.data_dir is None else Path(self.data_dir)
        groups = {name: find([name], data_dir) for name in self.tasks}
        found = {name: group for group, members in groups.items() for name in members}
        for name in {*_names(self.protocol), *_names(self.limit)} - {*groups, *found}:
            raise ValueError(
                f"{name} has a limit or protocol and is not one of the tasks: {', '.join(found)}."
            )
        asked = [self._question(name, groups[group][name], group) for name, group in found.items()]
        if any(variant.method in OF_DOMAIN for variant in self.variants):
            for question in asked:
                refuse_none_left(question.name, question.task, question.limit)
        return asked

    def _question(self, name: str, task: Task | Articles, group: str) -> Question:
        # Generation has a prompt and continues it, whatever the protocol of likelihoods.
        has_protocol = not isinstance(task, Articles) and task.OUTPUT_TYPE != "generate_until"
        protocol: Protocol | None = None
        if has_protocol:
            protocol = _of_task(self.protocol, name, group)
        limit = None if self.limit is None else _of_task(self.limit, name, group)
        return Question(name, task, protocol or "context", limit)


def variants_of(methods: Iterable[str], densities: Iterable[float]) -> list[Variant]:
    """The full model, and each method at each density, or at its own as in "topk@0.25".

    Raises
    ------
    ValueError
        For an unknown method, or a density that is out of range.
    """
    densities = list(densities)
    found = [FULL]
    for text in methods:
        name, at, own = text.partition("@")
        if name not in (known := (*CHOICES, *OF_DOMAIN)):
            raise ValueError(f"there is no method {name!r}: choose from {', '.join(known)}.")
        try:
            wanted = [float(own)] if at else densities
        except ValueError:
            wanted = [0.0]
        if any(not 0 < density <= 1 for density in wanted):
            said = f"method {text!r}" if at else f"densities {densities}"
            raise ValueError(f"{said}: give a density above 0 and at most 1.")
        if name != "full":
            found += [Variant(name, density) for density in wanted]
    return list(dict.fromkeys(found))


def _values(setting: _T | Mapping[str, _T]) -> list[_T]:
    return list(setting.values()) if isinstance(setting, Mapping) else [setting]


def _names(setting: object) -> list[str]:
    return [name for name in setting if name] if isinstance(setting, Mapping) else []


def _of_task(setting: _T | Mapping[str, _T], name: str, group: str) -> _T | None:
    """The task's own setting, its group's, or that of all others, whose name is empty."""
    if not isinstance(setting, Mapping):
        return setting
    return setting.get(name, setting.get(group, setting.get("")))
