"""What plots are given: recordings, from which they call the measures, or a measure's results."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard, TypeVar, cast

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from flocking.analysis import intervals
from flocking.drawing import CONTROL, MODEL

_SHARE = 0.85  # of a figure's width, that its legend may have: the rest is for the y axis

_Function = TypeVar("_Function", bound=Callable[..., Any])


def is_recording(data: object) -> TypeGuard[xr.Dataset]:
    """Whether something is a recording rather than a measure's result; measures check the rest."""
    return isinstance(data, xr.Dataset) and "phase" in data.variables


def results(
    data: object, measure: Callable[[xr.Dataset], Any], *names: str, of: str = "data"
) -> xr.Dataset:
    """Results by name: of `measure` for a recording, or those that were given as the argument `of`.

    Raises
    ------
    TypeError
        If `data` is neither a recording nor results.
    ValueError
        If the results lack one of the names.
    """
    if is_recording(data):
        refuse_empty(data)
        found = measure(data)
        return found if isinstance(found, xr.Dataset) else found.to_dataset(name=names[0])
    if isinstance(data, xr.DataArray) and len(names) == 1:
        return data.to_dataset(name=names[0])
    if not isinstance(data, xr.Dataset):
        raise TypeError(
            f"{of} is a {type(data).__name__}: give a recording (the Dataset that flocking.record "
            f"returns), or {'a Dataset with ' if names else ''}{', '.join(names) or 'results'}."
        )
    if lacking := [name for name in names if name not in data]:
        raise ValueError(
            f"{of} has no {lacking[0]!r}: give a recording, or a Dataset with {', '.join(names)}."
        )
    return data


def refuse_empty(data: Any) -> None:
    """Refuse a recording from which nothing is left."""
    for dim in ("sequence", "layer"):
        if dim in data.dims and not data.sizes[dim]:
            raise ValueError(f"there is no {dim} to draw: the recording has none left.")


def compared(data: Any, control: Any) -> list[tuple[str, Any, dict[str, Any]]]:
    """The arguments that are drawn, and how: the control, if there is one, after the model."""
    return [
        ("data", data, MODEL),
        *([] if control is None else [("control", control, CONTROL)]),
    ]


def refuse_other_density(found: xr.Dataset, other: xr.Dataset) -> None:
    """Refuse a control at another density, which is not to be held against the model's chance."""
    mine, theirs = (each.coords.get("density") for each in (found, other))
    if mine is None or theirs is None or np.array_equal(mine.values, theirs.values):
        return
    told = [listed(np.atleast_1d(each.values).tolist()) for each in (theirs, mine)]
    raise ValueError(
        f"control is of density {told[0]}, and data of {told[1]}: compare those of one density."
    )


def density_for(
    density: float | Iterable[float] | None, data: object, control: object
) -> float | Iterable[float]:
    """The density at which recordings are measured: as given, or else that of results beside them.

    Parameters
    ----------
    density : float, iterable of float, or None
        As given to a plot.
    data, control : object
        Recordings, results or None.

    Raises
    ------
    ValueError
        If results are of another density than is given, or do not say of which they are.
    """
    if density is not None and not isinstance(density, int | float | np.number):
        density = list(density)
    for name, one in (("data", data), ("control", control)):
        if is_recording(one) or not isinstance(one, xr.Dataset | xr.DataArray):
            continue
        own = one.coords.get("density")
        known = None if own is None or own.dims not in ((), ("layer",)) else own.values.tolist()
        if density is None:
            return 0.5 if known is None else known
        if known is None or not np.array_equal(density, known):
            told = "do not say theirs" if known is None else f"are of {known}"
            raise ValueError(
                f"density={density}: {name} are results, which {told}: leave density out, or give "
                "a recording."
            )
    return 0.5 if density is None else density


def summary(values: xr.DataArray, dim: str) -> xr.DataArray:
    """Mean over sequences with its interval, along `dim`.

    Parameters
    ----------
    values : xarray.DataArray, ([interval,] [sequence, [other,]] [dim]), or of pairs or summaries
        As a measure returns it; or averaged over sequences, with intervals or without. One of
        `dim` may have been selected.

    Returns
    -------
    xarray.DataArray, (interval, dim)
        NaN for an interval that is not known, as of one sequence.

    Raises
    ------
    ValueError
        If there are other dimensions.
    """
    if dim not in values.dims:
        values = values.expand_dims(dim)
    if "summary" in values.dims:  # of flocking.mean_scores
        values = values.sel(summary="mean", drop=True)
    if "sequence" in values.dims or "pair" in values.dims:
        values = intervals(values)
    elif "interval" not in values.dims:
        unknown = xr.full_like(values, np.nan, dtype=np.float64)
        names = xr.DataArray(["estimate", "low", "high"], dims="interval", name="interval")
        values = xr.concat([values, unknown, unknown], names)
    if more := [str(d) for d in values.dims if d not in ("interval", dim)]:
        raise ValueError(
            f"{values.name} has dimensions {', '.join(more)}, too: select one of each, or average."
        )
    return values.transpose("interval", dim)


def one_of(data: xr.Dataset | xr.DataArray, dim: str, label: object, name: str) -> Any:
    """What has one label of a dimension; the only one if none is asked for.

    Raises
    ------
    TypeError
        If the label is several.
    ValueError
        If the label is not there or is there twice, or none is given where there are several.
    """
    if np.ndim(label) > 0:  # type: ignore[arg-type]  # (of anything)
        raise TypeError(f"{name}={label!r} is several: give one label, as in {name}=0.")
    if dim not in data.dims:
        if label is not None and dim in data.coords and data[dim].item() != label:
            raise ValueError(f"{name}={label!r}: data is of {name} {data[dim].item()!r} alone.")
        if label is not None and dim not in data.coords:
            raise ValueError(f"{name}={label!r}: data does not say of which {name} it is.")
        return data
    labels = data[dim].values.tolist() if dim in data.coords else list(range(data.sizes[dim]))
    found = list(range(len(labels))) if label is None else _places(labels, label)
    if len(found) == 1:
        return data.isel({dim: found[0]})
    if label is None:
        raise ValueError(
            f"there are {len(labels)} {name}s ({listed(labels)}): choose one, as in "
            f"{name}={labels[0]!r}."
            if labels
            else f"there is no {name} to draw: the recording has none left."
        )
    if found:
        raise ValueError(
            f"{name}={label!r} is there {len(found)} times: select one by its position first, with "
            f"isel({dim}=[{found[0]}])."
        )
    raise ValueError(f"there is no {name} {label!r}: choose from {listed(labels)}.")


def _places(labels: Sequence[object], label: object) -> list[int]:
    # (True and 1 are equal, and only one of them is a label.)
    flag = isinstance(label, bool | np.bool_)
    return [
        n for n, other in enumerate(labels) if other == label and isinstance(other, bool) == flag
    ]


def listed(labels: Sequence[object], most: int = 8) -> str:
    """Labels in a sentence: runs of whole numbers by their ends, and of many the first ones."""
    numbers = [label for label in labels if isinstance(label, int)]
    if len(numbers) == len(labels) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}"
    shown = ", ".join(map(repr, labels[:most]))
    return shown if len(labels) <= most else f"{shown}, ..."


def leaving_no_figure(function: _Function) -> _Function:
    """Make a plot that is refused close the figures that it has opened until then."""

    @functools.wraps(function)
    def drawn(*args: Any, **kwargs: Any) -> Any:
        before = plt.get_fignums()
        current = plt.gcf().number if before else None
        try:
            return function(*args, **kwargs)
        except BaseException:
            for number in {*plt.get_fignums()} - {*before}:
                plt.close(number)
            if current is not None:
                plt.figure(current)
            raise

    return cast(_Function, drawn)


def several(axes: Iterable[Axes] | None, count: int, size: tuple[float, float]) -> np.ndarray:
    """Axes to draw on: those given, or of a new figure, one below the other.

    Raises
    ------
    TypeError
        If they are no axes.
    ValueError
        If there are not as many, or one is there twice.
    """
    if axes is None:
        figure = plt.figure(figsize=size, layout="constrained")
        return np.asarray(figure.subplots(count, 1, sharex=True))
    wanted = f"axes: give {count}, as plt.subplots({count})[1] has them"
    if isinstance(axes, Axes):
        raise ValueError(f"{wanted}, and not one only.")
    if isinstance(axes, str) or not isinstance(axes, Iterable):
        raise TypeError(f"{wanted}, and not a {type(axes).__name__}.")
    given = list(_flat(axes.values() if isinstance(axes, Mapping) else axes))
    if wrong := [one for one in given if not isinstance(one, Axes)]:
        raise TypeError(f"{wanted}, and not a {type(wrong[0]).__name__} among them.")
    for one in given:
        check_ax(one, "axes")
    if len(given) != count or len({*map(id, given)}) != count:
        raise ValueError(f"{wanted}, and not {len({*map(id, given)})} different ones.")
    found = np.empty(count, object)
    found[:] = given
    return found


def _flat(axes: Iterable[Any]) -> Iterator[Any]:
    """Rows and columns of axes, one after the other."""
    for one in axes:
        if isinstance(one, list | tuple | np.ndarray):
            yield from _flat(np.ravel(np.asarray(one, object)))
        else:
            yield one


def check_ax(ax: object, name: str = "ax") -> None:
    """Raise a TypeError if something that was given to draw on is no axes.

    And a ValueError for axes in which neither lines nor cells would be where they belong.
    """
    if ax is None:
        return
    if not isinstance(ax, Axes):
        raise TypeError(
            f"{name} is a {type(ax).__name__}: give axes to draw on, as plt.subplots()[1] has them."
        )
    if not _is_flat(ax):
        raise ValueError(
            f"{name}: {ax.name} axes are given, and plots need an x and a y axis at right angles: "
            "make them without projection=."
        )


def _is_flat(ax: Axes) -> bool:
    """Whether axes have an x and a y axis: they are neither polar nor three-dimensional."""
    return ax.name == "rectilinear"


def refuse_shared_heights(panels: np.ndarray) -> None:
    """Refuse panels that share a y axis, where each needs its own scale."""
    for one, other in itertools.combinations(panels, 2):
        if one.get_shared_y_axes().joined(one, other):
            raise ValueError(
                "axes share their y axis, and what is drawn on them has different scales: give "
                "axes that are not shared, as plt.subplots makes without sharey."
            )


def free(ax: Axes | None) -> Axes:
    """Axes to draw on: those given; the current ones if they are empty, or those of a new figure.

    (After a plot of several panels, the current axes are one of these.)
    """
    check_ax(ax)
    if ax is not None:
        return ax
    if plt.get_fignums() and (plt.gca().has_data() or not _is_flat(plt.gca())):
        return plt.figure().gca()
    return plt.gca()


def small() -> float:
    """Size of markers on a line, in points, in the user's style."""
    return float(plt.rcParams["lines.markersize"]) / 2


def above(ax: Axes, ncols: int = 3) -> None:
    """Put a legend above axes of a new figure, in fewer columns if it would be too wide."""
    for columns in range(ncols, 0, -1):
        legend = ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, frameon=False)
        if legend.get_window_extent().width < _SHARE * ax.figure.bbox.width:
            return
    legend.set_in_layout(False)  # it would leave no room for the axes


def name_lines(ax: Axes) -> None:
    """Give axes a legend; one that is there keeps its entries, and gets those that it lacks."""
    old = ax.get_legend()
    if old is None:
        ax.legend(frameon=False)
        return
    entries = dict(
        zip([text.get_text() for text in old.get_texts()], old.legend_handles, strict=True)
    )
    drawn = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    if drawn.keys() - entries.keys():
        entries |= {name: handle for name, handle in drawn.items() if name not in entries}
        ax.legend(
            handles=[*entries.values()],
            labels=[*entries],
            frameon=old.get_frame_on(),
            title=old.get_title().get_text() or None,
        )
