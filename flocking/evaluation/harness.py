"""GRIFFIN as a model of the lm-evaluation-harness: ``lm_eval run --model griffin``.

Generation tasks go through the twin's own ``generate``. Likelihood tasks never enter generation:
for each request, neurons are selected from its context, and its continuation is computed with
these alone.
"""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import torch
import xarray as xr
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from flocking.artifacts import Key
from flocking.evaluation.answers import digest_of_weights, use_table
from flocking.evaluation.contexts import Request, asked_of, likelihoods
from flocking.evaluation.sharing import Shared
from flocking.evaluation.variants import CHOICES
from flocking.models import (
    prepared,
    read_model,
    reading,
    require_model,
    resolved,
    special_tokens_around,
    trusted,
)
from flocking.pruning import (
    WITH_REFERENCE,
    Protocol,
    SharedPrompts,
    calibration_texts,
    check_refresh,
    global_statistic,
    griffin,
    refuse_unscorable,
)


class Answered(NamedTuple):
    """What answering one request took, in tokens.

    Attributes
    ----------
    task : str
    item : int
        Number of the document in its task.
    prompt : int
        Run in full, and what the kept neurons are selected from.
    left_out : int
        Cut from the prompt's beginning, since they did not fit the model's context.
    scored, pruned : int
        Tokens whose likelihood was asked for, and how many of them were computed with the kept
        neurons alone. Both are 0 in generation, where all new tokens but the first (and, with
        ``refresh``, those after it) are computed so.
    """

    task: str
    item: int
    prompt: int
    left_out: int
    scored: int = 0
    pruned: int = 0


class _Whole:
    """In the place of a class such as ``AutoModelForCausalLM``: whole models, or an error."""

    def __init__(self, auto: Any) -> None:
        self.auto = auto

    def from_pretrained(self, name: str, *, trust_remote_code: Any, **kwargs: Any) -> Any:
        kwargs["trust_remote_code"] = trust_remote_code
        return read_model(self.auto, name, **kwargs)


@contextmanager
def _told_of_arguments(given: Iterable[str]) -> Iterator[None]:
    """Let an argument that the harness hands on, and that no model takes, be named."""
    try:
        yield
    except TypeError as problem:
        unknown = [
            name for name in given if f"unexpected keyword argument '{name}'" in str(problem)
        ]
        if not unknown:
            raise
        raise ValueError(
            f"{unknown[0]} is no argument of GriffinLM, the harness or this model: leave it out, "
            "or correct its name."
        ) from problem


@register_model("griffin")
class GriffinLM(HFLM):
    """The harness's ``hf`` model, generating and scored with GRIFFIN.

    Likelihoods are computed one context at a time; its continuations share the run of it.
    ``batch_size`` is how many continuations, or in generation prompts, are run together.

    The harness's ``--use_cache`` keeps answers of different models and settings apart, in one
    file. What is counted in the results, such as ``pruned_share``, is of the requests that were
    computed, not of those found there.

    Parameters
    ----------
    pretrained : str or transformers.PreTrainedModel
        As in the harness's ``hf``, or ``"default"`` for the embedded model. A GGUF file is named
        itself, or with ``gguf_file`` within a folder or hub repository.
    density : float
        Fraction of neurons kept.
    method : str
        Of :func:`flocking.griffin`, or ``"full"``: the model as it is, on the same path.
    protocol : {"context", "last-token"}
        Of likelihoods, as in :func:`flocking.score`. With "context" all tokens of a continuation
        but the first are computed pruned, so that continuations of one token are the full model's.
        With "last-token", the last token that is fed alone, as Dong, Chen and Chi (2024, arXiv
        2404.01365, section 5.1) have it. ``pruned_share`` in the results says, by task, what share
        of the scored tokens that is.
    scope : {"sequence", "shared"}
        Of generation. With "sequence", each prompt of a batch has its own selection, and results
        do not depend on ``batch_size``; with "shared", as in the paper's batches, they do.
    seed : int
        Of the methods that draw.
    refresh : int, optional
        After how many new tokens the full model reads them again, as of :func:`flocking.griffin`;
        continuations are then computed one at a time.
    calibration : path or list of str, optional
        What the static statistic of "static" and "global-local" is made from: a text file, a
        file of JSON lines or folder of such, or the texts; the packaged passages by default. A text
        that is longer than the context is read in pieces, which count as texts.
    **kwargs
        The harness's: ``dtype``, ``device``, ``batch_size``, ``revision``, ... Code that comes
        with a model is run with ``trust_remote_code=True`` alone, and nothing is asked.

    Raises
    ------
    ValueError
        As :func:`flocking.griffin` and :func:`flocking.load`, for an unknown method, protocol or
        argument, or ``batch_size="auto"``.
    TypeError
        If `pretrained` is neither a model nor a name.
    OSError, MemoryError
        As :func:`flocking.load`.
    """

    def __init__(
        self,
        pretrained: Any = "default",
        density: float = 0.5,
        method: str = "topk",
        protocol: Protocol = "context",
        scope: Literal["shared", "sequence"] = "sequence",
        seed: int = 0,
        refresh: int | None = None,
        calibration: str | Path | Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        if method not in CHOICES:
            raise ValueError(f"method={method!r}: choose from {', '.join(CHOICES)}.")
        if not isinstance(density, int | float):
            raise ValueError(f"density={density!r}: give the fraction of neurons to keep.")
        if protocol not in ("context", "last-token"):
            raise ValueError(f"protocol={protocol!r}: give 'context' or 'last-token'.")
        check_refresh(refresh)
        if "auto" in str(kwargs.get("batch_size")):
            raise ValueError("batch_size='auto' cannot be found out with GRIFFIN: give a number.")
        if isinstance(pretrained, str | os.PathLike):
            default = pretrained == "default"
            pretrained, kwargs = resolved(None if default else pretrained, kwargs)
            kwargs["trust_remote_code"] = trusted(kwargs.get("trust_remote_code"))
            prepared(AutoModelForCausalLM, pretrained, kwargs)
        else:
            require_model(pretrained)
        texts = calibration_texts(calibration)
        if isinstance(kwargs.get("tokenizer"), PreTrainedTokenizerBase):
            kwargs["tokenizer"] = copy.deepcopy(kwargs["tokenizer"])  # the harness changes it
        self._said = sorted(
            f"{name}={value!r}"
            for name, value in kwargs.items()
            if name not in ("batch_size", "device", "tokenizer")
        )
        with _told_of_arguments(kwargs):
            super().__init__(pretrained=pretrained, **kwargs)
        self.full = self.model
        self._protocol, self.scope, self.seed, self.refresh = protocol, scope, seed, refresh
        self.answered: list[Answered] = []
        self._instances: list[Instance] = []
        self._shared = Shared()
        self.calibration = texts
        self._reference: xr.DataArray | None = None
        self.prune(method, density)

    def prune(self, method: str, density: float) -> None:
        """Change the method and density that answers are computed with.

        Parameters
        ----------
        method, density
            As of the class.
        """
        self._model, self.method, self.density = self.full, "full", 1.0  # the old one makes room
        if method != "full":
            self._model = griffin(
                self.full,
                density,
                method=method,
                scope=self.scope,
                reference=self.reference() if method in WITH_REFERENCE else None,
                seed=self.seed,
                refresh=self.refresh,
            )
        self.method, self.density = method, density
        self._point_cache()

    @contextmanager
    def together(self, models: Sequence[PreTrainedModel]) -> Iterator[None]:
        """Compute what is asked for all of these models at once, so that they share the prompts.

        They are to be asked the same requests inside of the ``with``, each after
        :meth:`answer_with` it. What the first is asked is computed for all.

        Parameters
        ----------
        models : sequence of transformers.PreTrainedModel
            The full model, and twins of it.
        """
        before, self._shared = self._model, Shared(models)
        try:
            yield
        finally:
            self._shared, self._model = Shared(), before

    def answer_with(self, model: PreTrainedModel) -> None:
        """Let one of the models that are asked :meth:`together` answer from now on."""
        self._model = model

    @property
    def protocol(self) -> Protocol:
        """Of likelihoods, as of the class."""
        return self._protocol

    @protocol.setter
    def protocol(self, protocol: Protocol) -> None:
        self._protocol = protocol
        self._point_cache()

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Let the harness's cache keep answers of this model and these settings."""
        super().set_cache_hook(cache_hook)
        self._weights = digest_of_weights(self.full) if cache_hook.dbdict is not None else ""
        self._point_cache()

    def _point_cache(self) -> None:
        """The cache's table is that of all that answers depend on, but the requests."""
        if self.cache_hook.dbdict is None:
            return
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        inputs = [
            self._weights,
            backend.to_str() if backend else sorted(self.tokenizer.get_vocab().items()),
            [self.method, self.density, self.protocol, self.scope, self.seed, self.refresh],
            self.calibration if self.method in WITH_REFERENCE else None,
            self.batch_size if self.scope == "shared" else None,
            [self.max_length, self.device.type, self._said],
        ]
        key = Key.of(__name__, inputs, packages=["lm-eval", "tokenizers"])
        use_table(self.cache_hook.dbdict, f"griffin-{key.digest()}")

    def _get_config(self, pretrained: str, *args: Any, **kwargs: Any) -> None:
        with reading(pretrained):
            super()._get_config(pretrained, *args, **kwargs)

    def _create_tokenizer(self, pretrained: Any, tokenizer: Any, *args: Any, **kwargs: Any) -> None:
        name = tokenizer if isinstance(tokenizer, str) else str(pretrained)
        with reading(name, "tokenizer"):
            super()._create_tokenizer(pretrained, tokenizer, *args, **kwargs)

    def _create_model(self, *args: Any, **kwargs: Any) -> None:
        """As the harness does, but refuse what :func:`flocking.load` refuses."""
        auto: Any = self.AUTO_MODEL_CLASS  # type: ignore[has-type] # the harness sets it late
        whole: Any = _Whole(auto)
        self.AUTO_MODEL_CLASS = whole
        try:
            super()._create_model(*args, **kwargs)
        finally:
            self.AUTO_MODEL_CLASS = auto

    def reference(self) -> xr.DataArray:
        """The static statistic of the calibration texts."""
        if self._reference is None:
            self._reference = self.reference_of(self.calibration)
        return self._reference

    def reference_of(self, texts: Sequence[str] | Sequence[list[int]]) -> xr.DataArray:
        """The static statistic of texts, or of their token ids."""
        ids = self.tokens_of(texts)
        return global_statistic(self.full, ids, tokenizer=self.tokenizer, batch_size=1)

    def encoded(self, text: str, special: bool = True) -> list[int]:
        """Token ids of a text, which begins as a prompt of this model's does."""
        # (The length is cut later: a warning about it would be wrong.)
        special = special and self.add_bos_token is not False
        ids = self.tokenizer(text, verbose=False, add_special_tokens=special)["input_ids"]
        return list(ids)

    def tokens_of(self, texts: Sequence[str] | Sequence[list[int]]) -> list[list[int]]:
        """Token ids of texts, those that do not fit the context in pieces that do."""
        found: list[list[int]] = []
        for text in texts:
            ids = self.encoded(text) if isinstance(text, str) else list(text)
            if isinstance(text, str) and len(ids) > self.max_length:
                found += self._pieces(text)
            else:
                found.append(ids[: self.max_length])
        return found

    def _pieces(self, text: str) -> Iterator[list[int]]:
        """Token ids of a long text in pieces that fit the context, each as a text alone."""
        before, after = special_tokens_around(self.tokenizer)
        if self.add_bos_token is False:
            before, after = [], []
        ids, room = self.encoded(text, special=False), self.max_length - len(before) - len(after)
        for start in range(0, len(ids), room):
            yield [*before, *ids[start : start + room], *after]

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes down with the results."""
        settings = {
            name: getattr(self, name)
            for name in ("method", "density", "protocol", "scope", "seed", "refresh")
        }
        scored, pruned = Counter[str](), Counter[str]()
        for one in self.answered:
            scored[one.task] += one.scored
            pruned[one.task] += one.pruned
        share = {task: pruned[task] / count for task, count in scored.items() if count}
        too_long = Counter(one.task for one in self.answered if one.left_out)
        return {
            **super().get_model_info(),
            "griffin": settings,
            "pruned_share": share,
            "requests_cut": dict(too_long),
        }

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Answer as the harness does, and note what each request took."""
        self._instances = requests
        try:
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        finally:
            self._instances = []

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate as the harness does, and note what each request took."""
        for request in requests:
            context, options = request.args
            length = len(self.tok_encode(context))
            if not length:
                raise ValueError(
                    f"{request.task_name}, item {request.doc_id}: the prompt has no token that "
                    "neurons could be selected from: leave the item out."
                )
            room = normalize_gen_kwargs(options, self.max_gen_toks)["max_gen_toks"]
            left_out = max(0, length - (self.max_length - room))
            self._note(request, length - left_out, left_out)
        return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def _named(self, number: int) -> str:
        """The task and item of a request, for messages, if they are known."""
        if number >= len(self._instances):
            return ""
        asked = self._instances[number]
        return f"{asked.task_name}, item {asked.doc_id}: "

    def _note(self, request: Instance, *tokens: int) -> None:
        self.answered.append(Answered(request.task_name or "", request.doc_id, *tokens))

    def loglikelihood_rolling(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse the likelihood of a whole text."""
        raise ValueError(
            "a rolling likelihood has no prompt to select neurons from: use flocking.perplexity, "
            "which takes a text's beginning as the prompt."
        )

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        refuse_unscorable(self.model, [])
        asked = asked_of(requests, self.max_length, self.protocol, self._named)
        answers = self._shared.of(
            self.model,
            tuple((tuple(one.tokens), one.scored, one.cut) for one in asked),
            lambda models: likelihoods(models, asked, self.batch_size, disable_tqdm),
        )
        for (said, _, _), answer in zip(requests, answers, strict=True):
            if said is not None:
                self.cache_hook.add_partial("loglikelihood", said, answer)
        for instance, one in zip(self._instances, asked, strict=False):
            self._note(instance, one.cut, one.left_out, one.scored, one.pruned(self.model))
        return answers

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **options: Any
    ) -> Tensor:
        """As the harness does, from prompts that the models of the moment share."""
        mask = options["attention_mask"]

        def generated(models: list[PreTrainedModel]) -> Iterator[Tensor]:
            shared = SharedPrompts(models, context, mask)
            asked = self._model
            try:
                for model in models:
                    self._model = model
                    more = dict(options) | shared.cache_for(model)
                    yield super(GriffinLM, self)._model_generate(context, max_length, stop, **more)
            finally:
                self._model = asked

        told = sorted((name, repr(value)) for name, value in options.items() if value is not mask)
        key = (context.cpu().numpy().tobytes(), mask.cpu().numpy().tobytes(), max_length, str(told))
        return self._shared.of(self.model, key, generated)
