"""Means over the texts of a corpus that is not kept: running sums, which can be put together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, Self

import numpy as np
import xarray as xr
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flocking.analysis.metrics import effective_neurons, flocking_score, named
from flocking.analysis.provenance import made_of
from flocking.analysis.selection import statistic
from flocking.analysis.texts_in_turn import in_turn
from flocking.models import Text
from flocking.recording import require

STATIC = "static statistic (root of the mean over texts of energy per token) of"
_EQUAL = (
    *("model", "revision", "architecture", "dtype", "special_tokens"),
    *("adapter", "autocast"),  # which older recordings do not tell of
)
_OF_LAYERS = ("layer", "module", "d_ff", "experts", "expert")
_SUMMARY = ["mean", "standard_error", "texts"]

Measure = Callable[[xr.Dataset], xr.DataArray]


class _Running(ABC):
    """Sums over texts, as a Dataset, and what the recordings that they are from have in common."""

    def __init__(self, *measures: Measure) -> None:
        self._measures = measures
        self._sums: xr.Dataset | None = None

    @abstractmethod
    def _has_added(self, sums: xr.Dataset) -> bool:
        """Whether sums are of this kind."""

    @abstractmethod
    def _added(self, first: xr.Dataset, second: xr.Dataset) -> xr.Dataset:
        """Both sums as one."""

    def _add(self, sums: xr.Dataset) -> None:
        if self._sums is not None:
            _refuse_others(self._sums, sums)
            attributes = {**sums.attrs, **self._sums.attrs}
            sums = self._added(self._sums, sums).assign_attrs(attributes)
        self._sums = sums

    def _given(self) -> xr.Dataset:
        if self._sums is None:
            raise ValueError("there is no text yet: update with a recording first.")
        return self._sums

    @property
    def texts(self) -> int:
        """Number of texts so far."""
        return 0 if self._sums is None else int(self._sums["texts"])

    def state(self) -> xr.Dataset:
        """The sums, to be saved or sent to another process; see :meth:`from_state`."""
        return self._given().copy(deep=True)

    @classmethod
    def from_state(cls, state: xr.Dataset, *measures: Measure) -> Self:
        """The inverse of :meth:`state`; `measures` as they were given, to update it further."""
        if not isinstance(state, xr.Dataset) or "texts" not in state:
            raise TypeError(
                f"expected the Dataset that state() returns, got a {type(state).__name__}."
            )
        made = cls(*measures)
        if not made._has_added(state):
            raise ValueError(
                f"state is not that of a {cls.__name__}: it has {', '.join(map(str, state))}."
            )
        made._sums = state.load().copy(deep=True)
        return made

    def __add__(self, other: object) -> Self:
        """The sums over the texts of both."""
        made = type(self)(*self._measures)
        parts = [self._sums]
        if isinstance(other, type(self)):
            parts.append(other._sums)
        elif not (isinstance(other, int) and other == 0):  # where sum() begins
            return NotImplemented
        for sums in parts:
            if sums is not None:
                made._add(sums)
        return made

    __radd__ = __add__

    def __repr__(self) -> str:
        """The class and the number of texts."""
        return f"<{type(self).__name__} of {self.texts:,} texts>"


class RunningStatistic(_Running):
    """The static statistic of texts that come one recording after the other.

    What :func:`flocking.global_statistic` returns, in the memory of one statistic: the root of the
    mean over texts of energy per token. Those of several shards, processes or machines add up.

    Examples
    --------
    >>> texts = [text[:300] for text in flocking.passages()[:4]]
    >>> first, second = flocking.RunningStatistic(), flocking.RunningStatistic()
    >>> for running, part in ((first, texts[:2]), (second, texts[2:])):
    ...     running.update(flocking.record(model, part, window=None, progress=False))
    >>> both = first + second
    >>> both
    <RunningStatistic of 4 texts>
    >>> reference = both.result()
    >>> reference.dims, reference.shape
    (('layer', 'neuron'), (2, 64))
    >>> pruned = flocking.griffin(model, method="static", reference=reference)

    To another process, or into a file, goes its state, a Dataset:

    >>> flocking.RunningStatistic.from_state(first.state())
    <RunningStatistic of 2 texts>
    """

    def __init__(self) -> None:
        super().__init__()

    def update(self, recording: xr.Dataset) -> None:
        """Add the texts of a recording.

        Parameters
        ----------
        recording : xarray.Dataset
            From :func:`flocking.record`, with any window; in memory or in chunks.

        Raises
        ------
        TypeError
            If it is not a recording.
        ValueError
            If it is of another model, or other layers, than those before; nothing is added then.
        """
        self._add(_sums_of(recording))

    def result(self) -> xr.DataArray:
        """The statistic, float64 (layer, neuron), unitless; NaN where no text has tokens.

        Raises
        ------
        ValueError
            If there is no text yet.
        """
        sums = self._given()
        values = (sums["total"] / sums["count"].where(sums["count"] > 0)) ** 0.5
        values = named(values, "statistic", "statistic over a calibration set")
        return made_of(values, f"{STATIC} {in_words(self.texts, int(sums['tokens']))}")

    def _has_added(self, sums: xr.Dataset) -> bool:
        return {"total", "count", "texts", "tokens"} == {*sums}

    def _added(self, first: xr.Dataset, second: xr.Dataset) -> xr.Dataset:
        return xr.Dataset(
            {name: first[name].variable + second[name].variable for name in first}, first.coords
        )


def in_words(texts: int, tokens: int) -> str:
    """How many texts of how many tokens."""
    return f"{texts:,} text{'s' if texts != 1 else ''} of {tokens:,} tokens"


def energy_per_token(recording: xr.Dataset) -> xr.DataArray:
    """The mean over each text's tokens of squared relative activations, (sequence, ...)."""
    energy = statistic(recording)
    return energy**2 / energy.tokens


def _sums_of(recording: xr.Dataset) -> xr.Dataset:
    """The sums of one recording's texts, (layer, neuron)."""
    require(recording, "energy", "tokens")
    values = _of_several(recording, energy_per_token(recording))
    known = values.notnull()
    sums = xr.Dataset({"total": values.sum("sequence"), "count": known.sum("sequence")}).compute()
    counts = {"texts": values.sizes["sequence"], "tokens": int(recording.tokens.sum())}
    return _without_texts(sums).assign(counts).assign_attrs(_origin(recording))


def _of_several(recording: xr.Dataset, values: xr.DataArray) -> xr.DataArray:
    """Values over sequences, also where one was selected."""
    return values if "sequence" in recording.dims else values.expand_dims("sequence")


def _origin(recording: xr.Dataset) -> dict[str, Any]:
    return {name: recording.attrs[name] for name in _EQUAL if name in recording.attrs}


def _without_texts(sums: xr.Dataset) -> xr.Dataset:
    """The sums with coordinates of layers, neurons and dimensions alone, which all have."""
    wanted = {*_OF_LAYERS, *sums.dims}
    return sums.drop_vars([name for name in sums.coords if name not in wanted])


def _refuse_others(first: xr.Dataset, second: xr.Dataset) -> None:
    """Refuse sums of other models or layers."""
    for name in _EQUAL:
        mine, theirs = first.attrs.get(name), second.attrs.get(name)
        if name in ("adapter", "autocast") and None in (mine, theirs):
            continue
        if str(mine) != str(theirs):
            raise ValueError(
                f"the texts before are of {name} {mine!r}, and these of {theirs!r}: only those of "
                "one model can be put together."
            )
    if {*first} != {*second}:
        names = [", ".join(sorted(map(str, each))) for each in (first, second)]
        raise ValueError(f"other sums ({names[0]}; {names[1]}): put those of one kind together.")
    dims = dict.fromkeys((*first.sizes, *second.sizes))
    differ = [dim for dim in dims if first.sizes.get(dim) != second.sizes.get(dim)]
    if differ and differ[0] not in (*_OF_LAYERS, "neuron"):
        had, has = (each.sizes.get(differ[0], "no") for each in (first, second))
        raise ValueError(
            f"the texts before have {had} values along {differ[0]}, and these {has}: give a "
            "measure that has as many for all texts."
        )
    if differ or not first.coords.equals(second.coords):
        raise ValueError(
            "the texts before are of other layers or neurons than these: record the same layers of "
            "all."
        )


class RunningScores(_Running):
    """Mean scores by layer of texts that come one recording after the other.

    Of each measure: its mean over texts, the standard error of that mean (the standard deviation
    over texts divided by the root of their number), and how many texts have a value, all by layer.
    Updated by Welford's method, and put together by that of Chan, Golub and LeVeque (1983, The
    American Statistician 37, 242-247).

    Parameters
    ----------
    *measures : callable
        Functions of a recording that return values over (sequence, ...), such as those of
        ``flocking``; by default :func:`flocking.flocking_score` and
        :func:`flocking.effective_neurons`.

    Examples
    --------
    >>> running = flocking.RunningScores(flocking.flocking_score, flocking.consistency)
    >>> for text in flocking.passages()[:3]:
    ...     running.update(flocking.record(model, text[:300], window=None, progress=False))
    >>> scores = running.result()
    >>> scores.flocking_score.dims, scores.summary.values.tolist()
    (('summary', 'layer'), ['mean', 'standard_error', 'texts'])
    >>> scores.consistency.sel(summary="texts").values.tolist()
    [3.0, 3.0]
    """

    def __init__(self, *measures: Measure) -> None:
        for each in measures:
            if not callable(each):
                raise TypeError(
                    f"{each!r} is not a function of a recording: give flocking.flocking_score, say."
                )
        super().__init__(*measures or (flocking_score, effective_neurons))

    def update(self, recording: xr.Dataset) -> None:
        """Add the texts of a recording.

        Parameters
        ----------
        recording : xarray.Dataset
            From :func:`flocking.record`, in memory or in chunks.

        Raises
        ------
        TypeError
            If it is not a recording.
        ValueError
            If it is of another model, or other layers, than those before, a measure has no value
            by sequence, or two give values of one name; nothing is added then.
        """
        require(recording)
        found: dict[str, xr.DataArray] = {}
        for each in self._measures:
            values = each(recording)
            if isinstance(values, xr.DataArray):
                values = _of_several(recording, values)
            if not isinstance(values, xr.DataArray) or "sequence" not in values.dims:
                raise ValueError(
                    f"{getattr(each, '__name__', each)} gives no values by sequence: give measures "
                    "such as flocking.flocking_score."
                )
            if "other" in values.dims:
                raise ValueError(
                    f"{getattr(each, '__name__', each)} compares the texts of one recording with "
                    "each other, and texts that come later cannot be added: give measures of each "
                    "text, such as flocking.flocking_score."
                )
            name = str(values.name or getattr(each, "__name__", "values"))
            if name in found:
                raise ValueError(
                    f"two measures give values named {name!r}: rename those of one, as in "
                    "lambda recording: measure(recording).rename('another')."
                )
            found |= _moments_of(values, name)
        sums = xr.Dataset(found, {"summary": _SUMMARY})
        sums = sums.assign(texts=recording.sizes.get("sequence", 1))
        self._add(_without_texts(sums).assign_attrs(_origin(recording)))

    def result(self) -> xr.Dataset:
        """Means over texts, standard errors and numbers of texts, each (summary, ...), float64.

        The standard error of one text is NaN.

        Raises
        ------
        ValueError
            If there is no text yet.
        """
        sums = self._given()
        result = {}
        for name in (name for name in sums if name != "texts"):
            mean, squares, count = (sums[name].isel(summary=n, drop=True) for n in range(3))
            several = count.where(count > 1)
            error = (squares / (several - 1) / several) ** 0.5
            parts = [mean.where(count > 0), error, count]
            joined = xr.concat(parts, sums["summary"], coords="minimal", compat="override")
            result[name] = joined.assign_attrs(sums[name].attrs)
        return xr.Dataset(result, attrs=sums.attrs)

    def _has_added(self, sums: xr.Dataset) -> bool:
        return "summary" in sums.dims

    def _added(self, first: xr.Dataset, second: xr.Dataset) -> xr.Dataset:
        parts = {
            name: first[name].variable + second[name].variable
            if name == "texts"
            else _merged(first[name], second[name])
            for name in first
        }
        return xr.Dataset(parts, first.coords)


def _moments_of(values: xr.DataArray, name: str) -> dict[str, xr.DataArray]:
    """Mean, sum of squared differences from it, and number, (summary, ...), over sequences."""
    described = values.attrs
    values = values.astype(np.float64).compute()
    count = values.notnull().sum("sequence").astype(np.float64)
    mean = values.sum("sequence") / count.where(count > 0, 1)
    squares = ((values - mean) ** 2).sum("sequence")
    parts = [mean, squares, count]
    joined = xr.concat(parts, "summary", coords="minimal", compat="override")
    return {name: joined.assign_attrs(described)}


def _merged(first: xr.DataArray, second: xr.DataArray) -> xr.Variable:
    """The moments of both sets of values."""
    (mean, squares, count), (other, more, number) = (
        each.transpose("summary", ...).values for each in (first, second)
    )
    together = count + number
    share = number / np.where(together > 0, together, 1)
    difference = other - mean
    values = [
        mean + difference * share,
        squares + more + difference**2 * count * share,
        together,
    ]
    return xr.Variable(first.transpose("summary", ...).dims, np.stack(values), first.attrs)


def mean_scores(
    model: PreTrainedModel,
    texts: Text | Iterable[Any],
    *measures: Measure,
    tokenizer: PreTrainedTokenizerBase | None = None,
    window: int | None = None,
    layers: Iterable[int] | None = None,
    relative: bool = False,
    ranks: bool = False,
    max_tokens: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> xr.Dataset:
    """Mean scores by layer of any number of texts, none of which is kept.

    Each batch is recorded, measured and let go, so that memory does not grow with the texts.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    texts : str, list of str, list of list of int, or an iterable of such
        What :func:`flocking.record` takes, or a generator, a column of a dataset, and the like.
    *measures : callable
        As in :class:`flocking.RunningScores`.
    tokenizer : transformers.PreTrainedTokenizerBase, optional
        For text; by default the one in the model's folder.
    window : int or None
        Tokens in a window, for measures that need several. By default None, the first token's
        window and one for each phase, while :func:`flocking.record` has windows of 64.
    layers, relative, ranks
        As of :func:`flocking.record`, for measures that need them: ``ranks=True`` for
        :func:`flocking.rank_consistency`.
    max_tokens : int or None
        Read at most this many tokens of each text, the first ones.
    batch_size : int
        Texts in one forward pass. Of what has no length, such as a generator, 1,024 texts at a time
        are sorted by length into batches.
    seed : int
        Of what is random in the model.
    progress : bool
        Show progress on standard error.

    Returns
    -------
    xarray.Dataset, float64, (summary, layer)
        Mean over texts, standard error and number of texts, for each measure, as
        :meth:`flocking.RunningScores.result` gives them.

    Raises
    ------
    UnsupportedModelError
        If the model's FF blocks cannot be located and proved.
    TypeError, ValueError
        As :func:`flocking.record` raises them; if there is no text.

    Examples
    --------
    >>> texts = (text[:300] for text in flocking.passages())
    >>> scores = flocking.mean_scores(model, texts, tokenizer=tokenizer, progress=False)
    >>> list(scores), scores.flocking_score.dims
    (['flocking_score', 'effective_neurons'], ('summary', 'layer'))
    >>> int(scores.flocking_score.sel(summary="texts", layer=0))
    12
    """
    running = RunningScores(*measures)
    for batch in in_turn(
        model,
        texts,
        tokenizer=tokenizer,
        max_tokens=max_tokens,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
        window=window,
        layers=layers,
        relative=relative,
        ranks=ranks,
    ):
        running.update(batch.recording)
    return running.result()
