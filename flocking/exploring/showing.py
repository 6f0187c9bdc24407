"""What ``flocking.explore`` returns."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from flocking.artifacts import replacing
from flocking.exploring.packing import Source, prepared
from flocking.exploring.page import page_of, place_of, refuse_page
from flocking.plotting.given import refuse_empty

if TYPE_CHECKING:
    from flocking.exploring.live import Widget

_MISSING = (
    "anywidget is not installed: pip install 'flocking[notebook]' brings it; or write a page with "
    "explore(recording).save('page.html')."
)


class Explorer:
    """A recording to look at, as :func:`flocking.explore` returns it.

    In JupyterLab it shows itself as the last line of a cell.
    """

    def __init__(self, recording: xr.Dataset) -> None:
        self._source = Source(recording)
        self._widget: Widget | None = None

    def __repr__(self) -> str:
        """What it shows, in numbers."""
        sizes = self._source.recording.sizes
        return (
            f"Explorer of {sizes['sequence']} text{'s' * (sizes['sequence'] != 1)} and "
            f"{sizes['layer']} layer{'s' * (sizes['layer'] != 1)} of {sizes['neuron']} neurons"
        )

    @property
    def widget(self) -> Widget:
        """The anywidget, to put beside other widgets; made when it is first asked for.

        Raises
        ------
        ImportError
            If anywidget is not installed.
        """
        if self._widget is None:
            try:
                from flocking.exploring.live import Widget
            except ModuleNotFoundError as problem:
                raise ImportError(_MISSING) from problem
            self._widget = Widget(self._source)
        return self._widget

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        """What a notebook shows; a sentence where anywidget is not installed."""
        try:
            widget = self.widget
        except ImportError as problem:
            return {"text/plain": f"{self!r}\n{problem}"}
        return widget._repr_mimebundle_(**kwargs)

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write one HTML file that shows the same, and loads nothing from anywhere.

        It opens from a disk in a browser, without Python; anywidget is not needed to write it. It
        has at most 20 MB: of a large recording, windows are added up, tokens are put together in
        rows, and if need be texts are left out, which the page says. Select layers or texts first
        to have these in full, as in ``explore(recording.sel(layer=[3])).save("layer-3.html")``.

        Parameters
        ----------
        path : str or Path
            Of a file that ends in ``.html``; ``~`` is the user's folder.
        overwrite : bool
            Replace such a page that is there. Nothing else is replaced.

        Returns
        -------
        Path
            Where it is.

        Raises
        ------
        TypeError
            If `path` is no path, or `overwrite` not a bool.
        ValueError
            If `path` has another suffix, is a URL or exists; if the recording has so many layers
            and neurons that no page of 20 MB can hold it.
        OSError
            If `path` cannot be written, or another process is writing it.
        """
        place = place_of(path)
        if not isinstance(overwrite, bool | np.bool_):
            raise TypeError(f"overwrite={overwrite!r}: give True or False.")
        check = functools.partial(refuse_page, place=place, overwrite=bool(overwrite))
        with replacing(place, check=check) as partial:
            partial.write_bytes(page_of(self._source.recording))
        return place


def explore(recording: xr.Dataset) -> Explorer:
    """Look at a recording in a notebook, or in a page: tokens against neurons, and what is kept.

    A text's tokens stand above a picture of a layer, with a row for each token and a column for
    each neuron. Choose a prompt by its tokens and a density: the page shows which neurons GRIFFIN
    would keep, and how much energy of the later tokens they miss. Columns are sorted by position,
    by the energy in the prompt, or by what tells this text from the others. Numbers are those of
    :func:`flocking.statistic`, :func:`flocking.select`, :func:`flocking.captured_energy` and
    :func:`flocking.jaccard`.

    Parameters
    ----------
    recording : xarray.Dataset
        From :func:`flocking.record`. With ``relative=True`` or a list of layers, rows are tokens;
        without, rows are windows. Sorting by specificity needs two texts or more.

    Returns
    -------
    Explorer
        Shows itself in JupyterLab, if anywidget is installed
        (``pip install 'flocking[notebook]'``). ``save(path)`` writes one HTML file of at most
        20 MB that shows the same from a disk, and replaces such a file with ``overwrite=True``;
        ``widget`` is the widget itself, to put beside others.

    Raises
    ------
    TypeError
        If `recording` is not a recording.
    ValueError
        If it was changed so that its parts contradict each other, or has no text, layer or token.

    Notes
    -----
    A notebook is sent one layer of a text at a time, in at most 4 million cells: of more, rows are
    the root mean square of several tokens, and windows are added up.

    Examples
    --------
    >>> text = "Birds of a feather flock together, and so do neurons."
    >>> recording = flocking.record(model, text, relative=True, window=4, progress=False)
    >>> explorer = flocking.explore(recording)
    >>> explorer
    Explorer of 1 text and 2 layers of 64 neurons
    >>> explorer.save("page.html").stat().st_size < 200_000
    True
    """
    whole = prepared(recording)
    refuse_empty(whole)
    if not int(whole.tokens.sum()):
        raise ValueError("the recording has no token left: select windows that have some.")
    return Explorer(whole)
