"""The twins of an evaluation's variants, made when they are needed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import xarray as xr
from transformers import PreTrainedModel

from flocking.artifacts import checksum
from flocking.evaluation.harness import GriffinLM
from flocking.evaluation.variants import FULL, Variant
from flocking.feedforward import feedforwards
from flocking.models import byte_count, mapped_bytes, usable_memory

_SHARE_OF_MEMORY = 0.6  # of what is free, for twins: caches and logits need the rest
Texts = Sequence[str] | Sequence[list[int]]


class Twins:
    """Twins of one model, each made once as long as it is used.

    Parameters
    ----------
    lm : GriffinLM
        Whose full model they are twins of.
    """

    def __init__(self, lm: GriffinLM) -> None:
        self._lm = lm
        self._made: dict[tuple[Variant, str], PreTrainedModel] = {}
        self._references: dict[str, xr.DataArray] = {}

    def keep(self, wanted: Iterable[tuple[Variant, Texts]]) -> None:
        """Drop those that are not among the ones wanted.

        The statistics that they were made from stay: they are small, and later tasks need them.
        """
        names = {self._named(*each) for each in wanted}
        self._made = {name: twin for name, twin in self._made.items() if name in names}

    def of(self, variant: Variant, texts: Texts) -> PreTrainedModel:
        """The model that answers as a variant; `texts` are those of its static statistic."""
        if variant == FULL:
            return self._lm.full
        name = self._named(variant, texts)
        if name not in self._made:
            self._made[name] = self._make(variant, texts, name[1])
        return self._made[name]

    def unread(self, wanted: Iterable[tuple[Variant, Texts]]) -> int:
        """Tokens that static statistics are still to be made from."""
        texts = {self._named(*each)[1]: each[1] for each in wanted}
        left = [found for digest, found in texts.items() if digest not in {"", *self._references}]
        return sum(len(row) for found in left for row in self._lm.tokens_of(found))

    def read(self, wanted: Iterable[tuple[Variant, Texts]]) -> None:
        """Make the static statistics that variants need."""
        for variant, texts in wanted:
            _, digest = self._named(variant, texts)
            if digest and digest not in self._references:
                self._references[digest] = self._lm.reference_of(texts)

    def _named(self, variant: Variant, texts: Texts) -> tuple[Variant, str]:
        return variant, checksum(list(texts)) if variant.twinned.needs_texts else ""

    def _make(self, variant: Variant, texts: Texts, digest: str) -> PreTrainedModel:
        self.read([(variant, texts)])
        reference = self._references.get(digest)
        return variant.twinned.of(self._lm.full, reference, self._lm.seed)


def in_memory(
    model: PreTrainedModel, variants: Iterable[Variant], copies: int = 1
) -> list[list[Variant]]:
    """Variants of a model in groups whose twins fit in memory together.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    variants : iterable of Variant
    copies : int
        Texts of a batch that have a selection each.
    """
    room = _SHARE_OF_MEMORY * _room(model)
    groups: list[list[Variant]] = []
    left = 0.0
    for variant in variants:
        size = share_of(variant, copies) * ff_bytes(model)
        if not groups or size > left:
            groups.append([])
            left = room
        groups[-1].append(variant)
        left -= size
    return groups


def refuse_without_memory(
    model: PreTrainedModel, groups: Iterable[tuple[Iterable[Variant], int]]
) -> None:
    """Raise a MemoryError if one twin alone takes more memory than is free.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    groups : iterable of (iterable of Variant, int)
        Variants, and texts of a batch that have a selection each.
    """
    free, whole = _room(model), ff_bytes(model)
    for variants, copies in groups:
        for variant in variants:
            size = share_of(variant, copies) * whole
            if size <= free:
                continue
            fitting = int(_SHARE_OF_MEMORY * free / size * copies)
            remedy = (
                f"give --batch-size {fitting} (batch_size={fitting})"
                if fitting
                else "free some, or take half precision (--dtype bfloat16)"
            )
            texts = f" of {copies} texts at once" if copies > 1 else ""
            raise MemoryError(
                f"{variant} takes {size / 1e9:.1f} GB for the kept weights{texts}, and "
                f"{free / 1e9:.1f} GB are free: {remedy}."
            )


def share_of(variant: Variant, copies: int) -> float:
    """FF weights that a variant's twin holds, as a multiple of the full model's.

    `copies` are as of :func:`in_memory`.
    """
    return 0.0 if variant == FULL else variant.twinned.copies(copies) * variant.density


def ff_bytes(model: PreTrainedModel) -> int:
    """Bytes of the weights of a model's FF blocks."""
    parts = [
        part
        for block in feedforwards(model)
        for part in (block.up, block.gate, block.down)
        if part is not None
    ]
    weights = {id(weight): weight for part in parts for weight in part.parameters()}
    return sum(map(byte_count, weights.values()))


def _room(model: PreTrainedModel) -> int:
    """Bytes of memory that are free where a model is."""
    places = {weight.device for weight in model.parameters()} - {torch.device("meta")}
    return max(0, sum(map(_free, places or {model.device})) - mapped_bytes(model))


def _free(device: torch.device) -> int:
    """Bytes of memory that are free on a device."""
    if device.type == "cuda":  # what torch keeps for later is free, too
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    return usable_memory().available
