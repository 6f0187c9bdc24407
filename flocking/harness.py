"""GRIFFIN as a model of the lm-evaluation-harness: ``lm_eval run --model griffin``.

Generation tasks go through the twin's own ``generate``. Likelihood tasks never enter generation:
each request's experts are chosen from its context, and its continuation is computed with them.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable
from itertools import groupby
from typing import Any, Literal, NoReturn

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm.auto import tqdm

from flocking.griffin import griffin
from flocking.models import embedded
from flocking.scoring import Protocol, beginning, cut_of, refuse_unscorable, rest

_Request = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model("griffin")
class GriffinLM(HFLM):
    """The harness's own model of a transformers model, generating and scored with GRIFFIN.

    Likelihoods are computed one context at a time, whatever the batch size, and its continuations
    share the run of it. Generation runs in batches.

    Parameters
    ----------
    pretrained : str or transformers.PreTrainedModel
        As in the harness's ``hf``, or ``"default"`` for the embedded model.
    density : float
        Fraction of neurons kept. At 1 it is the full model, on the same path.
    method : str
        Of :func:`flocking.griffin`, if it needs no reference.
    protocol : {"context", "last-token"}
        Of likelihoods, as in :func:`flocking.score`. With "context" all tokens of a continuation
        but the first are computed pruned, so that continuations of one token are the full model's.
        With "last-token", the last token that is fed alone, as Dong, Chen and Chi (2024, arXiv
        2404.01365, section 5.1) have it. ``pruned_share`` in the results says, by task, what share
        of the scored tokens that is.
    scope : {"sequence", "shared"}
        Of generation. With "sequence", each prompt of a batch has experts of its own, and results
        do not depend on ``batch_size``; with "shared", as in the paper's batches, they do.
    seed : int
        Of the methods that draw.
    **kwargs
        The harness's: ``dtype``, ``device``, ``batch_size``, ``revision``, ...

    Raises
    ------
    ValueError
        As :func:`flocking.griffin`, for an unknown protocol, or for ``batch_size="auto"``.
    """

    def __init__(
        self,
        pretrained: Any = "default",
        density: float = 0.5,
        method: str = "topk",
        protocol: Protocol = "context",
        scope: Literal["shared", "sequence"] = "sequence",
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        if protocol not in ("context", "last-token"):
            raise ValueError(f"protocol={protocol!r}: give 'context' or 'last-token'.")
        if "auto" in str(kwargs.get("batch_size")):
            raise ValueError("batch_size='auto' cannot be found out with GRIFFIN: give a number.")
        if pretrained == "default":
            pretrained = embedded()
        super().__init__(pretrained=pretrained, **kwargs)
        self.full = self.model
        self._model = griffin(self.full, density, method=method, scope=scope, seed=seed)
        self.protocol = protocol
        self.settings = {
            "density": density,
            "method": method,
            "protocol": protocol,
            "scope": scope,
            "seed": seed,
        }
        self._tasks: list[str] = []
        self._scored: Counter[str] = Counter()
        self._pruned: Counter[str] = Counter()

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes down beside the results."""
        share = {task: self._pruned[task] / count for task, count in self._scored.items()}
        return {**super().get_model_info(), "griffin": self.settings, "pruned_share": share}

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """As in the harness; the tasks' names are noted."""
        self._tasks = [request.task_name or "" for request in requests]
        try:
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        finally:
            self._tasks = []

    def loglikelihood_rolling(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse."""
        raise ValueError(
            "a rolling likelihood has no prompt to choose experts from: use flocking.perplexity, "
            "which takes a text's beginning for one."
        )

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[_Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        refuse_unscorable(self.model, [])
        longest = self.max_length + 1  # the last token is not fed
        sequences = [(context + later)[-longest:] for _, context, later in requests]
        cuts = [
            cut_of(self.protocol, len(tokens) - len(later), len(tokens))
            for tokens, (_, _, later) in zip(sequences, requests, strict=True)
        ]

        def head(number: int) -> list[int]:
            return sequences[number][: cuts[number]]

        answers: dict[int, tuple[float, bool]] = {}
        # The longest first, so that what does not fit fails at once.
        order = sorted(range(len(requests)), key=lambda n: (-cuts[n], head(n)))
        with tqdm(total=len(requests), desc="likelihoods", disable=disable_tqdm) as bar:
            for tokens, group in groupby(order, key=head):
                self._score(tokens, group, sequences, requests, answers)
                bar.update(len(answers) - bar.n)
        return [answers[number] for number in range(len(requests))]

    def _score(
        self,
        head: list[int],
        numbers: Iterable[int],
        sequences: list[list[int]],
        requests: list[_Request],
        answers: dict[int, tuple[float, bool]],
    ) -> None:
        """The requests whose sequences begin with `head`, which is run in full, and once."""
        first, past = beginning(self.model, torch.tensor([head]), len(head))
        for number in numbers:
            asked, _, later = requests[number]
            ids = torch.tensor([sequences[number]])
            after = rest(self.model, ids, len(head), copy.deepcopy(past))
            logits = torch.cat([first, after], dim=1) if after.shape[1] else first
            logits = logits[0, -len(later) :].float()
            due = torch.tensor(later, device=logits.device)
            likelihoods = logits.log_softmax(dim=-1).gather(-1, due[:, None])
            answers[number] = (
                float(likelihoods.double().sum()),
                bool((logits.argmax(dim=-1) == due).all()),
            )
            if self._tasks:
                self._scored[self._tasks[number]] += len(later)
                self._pruned[self._tasks[number]] += min(len(later), after.shape[1])
            if asked is not None:
                self.cache_hook.add_partial("loglikelihood", asked, answers[number])
