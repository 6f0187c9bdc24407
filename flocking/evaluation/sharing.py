"""Models that are asked the same things: what is computed for one is computed for all."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

from transformers import PreTrainedModel


class Shared:
    """Results of models that are asked the same, one model after the other.

    Parameters
    ----------
    models : sequence of transformers.PreTrainedModel
    """

    def __init__(self, models: Sequence[PreTrainedModel] = ()) -> None:
        self._models = list(models)
        self._kept: dict[Hashable, dict[int, deque[Any]]] = {}

    def of(
        self,
        model: PreTrainedModel,
        key: Hashable,
        compute: Callable[[list[PreTrainedModel]], Iterable[Any]],
    ) -> Any:
        """A model's result; those of the other models are kept until they are asked.

        Parameters
        ----------
        model : transformers.PreTrainedModel
            One of the models, or another one, which is computed alone.
        key : hashable
            What is asked. If the same is asked twice, the second result is computed anew.
        compute : callable
            Gives the result of each of the models that it is given.
        """
        if not any(model is one for one in self._models):
            (result,) = compute([model])
            return result
        kept = self._kept.setdefault(key, {id(one): deque() for one in self._models})
        if not kept[id(model)]:
            for one, result in zip(self._models, compute(self._models), strict=True):
                kept[id(one)].append(result)
        return kept[id(model)].popleft()
