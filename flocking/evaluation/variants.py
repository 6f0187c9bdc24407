"""The variants of a model that are asked: the full one, and methods at densities."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import xarray as xr
from transformers import PreTrainedModel

from flocking.evaluation.naming import label
from flocking.pruning import DRAWN, METHODS, WITH_REFERENCE, WITHOUT_TEXT, griffin

CHOICES = ("full", *METHODS, *WITH_REFERENCE)
# The names of methods in a plan that are no method of griffin, and what they stand for there.
OF_DOMAIN = {"static-domain": "static"}
_NUMBERED = ("refreshed", "shared")  # with a number after them, as in refreshed-64
NAMES = (*CHOICES, *OF_DOMAIN, *(f"{name}-N" for name in _NUMBERED))


@dataclass(frozen=True)
class Twinned:
    """How the twin of a variant is made.

    Attributes
    ----------
    method : str
        Of :func:`flocking.griffin`.
    density : float
    refresh : int, optional
        As of :func:`flocking.griffin`.
    texts : int
        How many prompts share a selection.
    of_domain : bool
        Whether a static statistic is of the task's own documents.
    """

    method: str
    density: float
    refresh: int | None = None
    texts: int = 1
    of_domain: bool = False

    @property
    def needs_texts(self) -> bool:
        """Whether a static statistic is needed."""
        return self.method in WITH_REFERENCE

    @property
    def draws(self) -> bool:
        """Whether random numbers are drawn."""
        return self.method in DRAWN

    @property
    def is_fixed(self) -> bool:
        """Whether the selection does not depend on the text."""
        return self.method in WITHOUT_TEXT

    def copies(self, texts: int) -> int:
        """How many selections a twin holds for a batch of so many texts, apart from each other."""
        return 1 if self.is_fixed else texts

    def of(
        self, model: PreTrainedModel, reference: xr.DataArray | None, seed: int
    ) -> PreTrainedModel:
        """The twin of a model; `reference` is the static statistic, if it needs one."""
        return griffin(
            model,
            self.density,
            method=self.method,
            # A selection that all texts have is held, and read in each step, once for all.
            scope="shared" if self.texts > 1 or self.is_fixed else "sequence",
            reference=reference if self.needs_texts else None,
            seed=seed,
            refresh=self.refresh,
        )


class Variant(NamedTuple):
    """A method at a density.

    ``refreshed-64`` is "topk" with a selection that is made anew after every 64 new tokens,
    ``shared-4`` "topk" with one selection for each four prompts, in generation.
    """

    method: str
    density: float

    def __str__(self) -> str:
        """As it is written in a plan."""
        return label(*self)

    @property
    def twinned(self) -> Twinned:
        """How its twin is made."""
        name, _, number = self.method.partition("-")
        if name == "refreshed":
            return Twinned("topk", self.density, refresh=int(number))
        if name == "shared":
            return Twinned("topk", self.density, texts=int(number))
        of_domain = self.method in OF_DOMAIN
        method = OF_DOMAIN.get(self.method, self.method)
        return Twinned(method, self.density, of_domain=of_domain)


FULL = Variant("full", 1.0)


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
        if not _is_known(name):
            raise ValueError(f"there is no method {name!r}: choose from {', '.join(NAMES)}.")
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


def _is_known(name: str) -> bool:
    numbered = re.fullmatch(rf"({'|'.join(_NUMBERED)})-[1-9][0-9]{{0,5}}", name)
    return name in CHOICES or name in OF_DOMAIN or numbered is not None
