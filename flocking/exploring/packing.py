"""What the page is sent of a recording: texts, and one layer of a text at a time, as bytes."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np
import xarray as xr

from flocking.drawing import brightest
from flocking.exploring.coarsening import Coarse, Runs, for_a_notebook, runs_of
from flocking.exploring.shares import specific
from flocking.recording import canonical

_TOLD = 60  # characters of a text that name it


class Packet(NamedTuple):
    """An answer to the page: what JSON can say, and arrays as bytes, little-endian."""

    content: dict[str, Any]
    buffers: list[bytes]


class Source:
    """A recording, and how coarsely it is shown.

    Parameters
    ----------
    recording : xarray.Dataset
        In its canonical form, see :func:`prepared`.
    coarse : Coarse, optional
        As fine as a notebook can hold, by default.
    """

    def __init__(self, recording: xr.Dataset, coarse: Coarse | None = None) -> None:
        self.recording = recording
        self.coarse = for_a_notebook(recording) if coarse is None else coarse
        self.unspecific = _unspecific(recording)
        self._runs: dict[int, Runs] = {}
        self._specific: tuple[int, np.ndarray] | None = None  # of the last layer asked for

    @property
    def keys(self) -> list[str]:
        """All that the page may ask for."""
        texts = range(self.coarse.sequences)
        layers = range(self.recording.sizes["layer"])
        return [f"text/{s}" for s in texts] + [f"layer/{s}/{n}" for s in texts for n in layers]

    def packet(self, key: str) -> Packet:
        """What belongs to a key.

        Raises
        ------
        ValueError
            If there is no such key.
        """
        kind, *numbers = str(key).split("/")
        sizes = (self.coarse.sequences, self.recording.sizes["layer"])
        places = [int(number) for number in numbers if number.isdecimal()]
        known = {"text": 1, "layer": 2}.get(kind) == len(numbers) == len(places)
        if not known or any(n >= size for n, size in zip(places, sizes, strict=False)):
            raise ValueError(f"there is no {key!r} in this explorer.")
        return self._text(*places) if kind == "text" else self._layer(*places)

    def runs(self, sequence: int) -> Runs:
        """Windows and rows of a text."""
        if sequence not in self._runs:
            self._runs[sequence] = runs_of(self.recording, sequence, self.coarse)
        return self._runs[sequence]

    def _text(self, sequence: int) -> Packet:
        recording, runs = self.recording, self.runs(sequence)
        members = np.concatenate([*runs.tokens, np.zeros(0, np.int64)]).astype(np.int64)
        words = [""] * len(members)
        if "token_text" in recording.coords:
            words = [str(word) for word in recording.token_text.values[sequence, members]]
        content = {
            "tokens": words,
            "places": recording.token.values[members].tolist()
            if "token" in recording.coords
            else members.tolist(),
            "windows": [len(tokens) for tokens in runs.tokens],
            "phases": [str(recording.phase.values[run[0]]) for run in runs.windows],
            "rows": [len(row) for row in runs.rows],
        }
        return Packet(content, [])

    def _layer(self, sequence: int, layer: int) -> Packet:
        recording, runs = self.recording, self.runs(sequence)
        width = int(recording.d_ff.values[layer])
        energy = self._energy(sequence, layer)[:, :width]
        relative, encoding = self._relative(sequence, layer)
        tells = np.zeros(0)
        if self.unspecific is None:
            if self._specific is None or self._specific[0] != layer:
                self._specific = layer, specific(recording, layer)
            tells = self._specific[1][sequence, :width]
            tells = tells if np.isfinite(tells).all() else np.zeros(0)
        counts = np.array([len(tokens) for tokens in runs.tokens])[:, None]
        shown = np.sqrt(energy.astype(np.float64) / counts)
        content = {"brightest": _brightest(shown), **encoding}
        return Packet(
            content,
            [
                np.ascontiguousarray(energy, "<f4").tobytes(),
                relative,
                np.ascontiguousarray(tells, "<f4").tobytes(),
            ],
        )

    def _energy(self, sequence: int, layer: int) -> np.ndarray:
        """By run of windows, float32 (run, neuron): one window's energy is what was recorded."""
        values = self.recording.energy.isel(sequence=sequence, layer=layer).values
        runs = self.runs(sequence).windows
        summed = [
            values[run[0]] if len(run) == 1 else values[run].sum(0, dtype=np.float64)
            for run in runs
        ]
        return np.array(summed, np.float32).reshape(len(runs), values.shape[-1])

    def _relative(self, sequence: int, layer: int) -> tuple[bytes, dict[str, Any]]:
        """Rows of tokens as bytes, and how to read them; nothing if the layer has none."""
        where = None if self.coarse.tokens is None else relative_of(self.recording).get(layer)
        if where is None:
            return b"", {}
        part = self.recording["relative"][sequence, where, :, : self.recording.d_ff.values[layer]]
        values = part.values
        rows = [
            values[row[0]]
            if len(row) == 1
            else np.sqrt((values[row].astype(np.float64) ** 2).mean(0))
            for row in self.runs(sequence).rows
        ]
        shown = np.array(rows, np.float16).reshape(len(rows), values.shape[-1])
        told = {"brightest_row": _brightest(shown)}
        if not self.coarse.rounded:
            return np.ascontiguousarray(shown, "<f2").tobytes(), told
        top = float(np.max(shown, initial=0)) or 1.0
        steps = np.rint(255 * np.sqrt(shown.astype(np.float64) / top)).astype(np.uint8)
        return steps.tobytes(), {**told, "top": top}


def prepared(recording: xr.Dataset) -> xr.Dataset:
    """The canonical form of a recording, with what there is of its large arrays.

    Raises
    ------
    TypeError
        If it is not a recording.
    ValueError
        If it was changed so that its parts contradict each other, or has nothing to show.
    """
    needed = ["energy", "mass", "norm", "tokens", "start", "token_window"]
    if isinstance(recording, xr.Dataset) and "relative" in recording.variables:
        needed.append("relative")
    return canonical(recording, *needed, some_layers=True).recording


def relative_of(recording: xr.Dataset) -> dict[int, int]:
    """Numbers of the layers that have ``relative``, each with its place there."""
    if "relative" not in recording:
        return {}
    labels = recording.layer.values.tolist()
    if "relative_layer" not in recording["relative"].dims:
        return {number: number for number in range(len(labels))}
    places = recording.relative_layer.values.tolist()
    return {n: places.index(label) for n, label in enumerate(labels) if label in places}


def _unspecific(recording: xr.Dataset) -> str | None:
    """Why texts cannot be told from each other, or None if they can."""
    if recording.sizes["sequence"] < 2:
        return "Sorting by specificity needs a recording of two texts or more; this has one."
    try:
        specific(recording.isel(neuron=slice(0)), 0)
    except ValueError as problem:
        return f"Sorting by specificity is not possible: {problem}"
    return None


def _brightest(shown: np.ndarray) -> float:
    """Value of the brightest colour, as in :func:`flocking.plot.heatmap`."""
    return brightest(shown[np.isfinite(shown)].astype(np.float32))


def told_of(source: Source) -> dict[str, Any]:
    """What the page is told once: names, widths, and in sentences what is shown."""
    recording, coarse = source.recording, source.coarse
    some = relative_of(recording) if coarse.tokens is not None else {}
    experts = recording.experts.values if "experts" in recording.coords else None
    names = recording.sequence.values.tolist() if "sequence" in recording.coords else []
    texts = recording.text.values.tolist() if "text" in recording.coords else []
    labels = recording.layer.values.tolist() if "layer" in recording.coords else []
    return {
        "model": _name(str(recording.attrs.get("model", ""))),
        "sequences": [
            _named(names[n] if names else n, texts[n] if texts else "")
            for n in range(coarse.sequences)
        ],
        "layers": [
            {
                "label": str(labels[n] if labels else n),
                "d_ff": int(recording.d_ff.values[n]),
                "experts": 1 if experts is None else max(1, int(experts[n])),
                "rows": n in some,
            }
            for n in range(recording.sizes["layer"])
        ],
        "specific": source.unspecific,
        "rounded": coarse.rounded,
        "notes": _notes(source, some),
    }


def _name(model: str) -> str:
    """A model's name: of a folder, without where it is on this machine."""
    return PurePath(model).name if PurePath(model).is_absolute() else model


def _named(name: object, text: str) -> str:
    words = " ".join(str(text).split())
    words = words if len(words) <= _TOLD else f"{words[: _TOLD - 1]}…"
    return f"{name}: {words}" if words else str(name)


def _notes(source: Source, some: dict[int, int]) -> list[str]:
    """What is not shown, or shown coarsely, a sentence each."""
    recording, coarse = source.recording, source.coarse
    notes = []
    total, layers = recording.sizes["sequence"], recording.layer.values
    if coarse.sequences < total:
        notes.append(
            f"The first {coarse.sequences} of {total} texts are here: select others before "
            "saving, as in recording.isel(sequence=[4, 5])."
        )
    kept = relative_of(recording)
    if not kept:
        notes.append(
            "Rows are windows: the recording has no relative activations by token, which "
            "record(..., relative=True) keeps."
        )
    elif not some:
        notes.append(
            "Rows are windows: there was no room for rows of tokens. Select fewer layers or texts."
        )
    elif len(kept) < len(layers):
        listed = ", ".join(str(layers[n]) for n in kept)
        notes.append(
            f"Rows of tokens are there for layer{'s' if len(kept) > 1 else ''} {listed}; of other "
            "layers, rows are windows."
        )
    if some and coarse.tokens != 1:
        notes.append(f"A row is the root mean square of up to {coarse.tokens} tokens.")
    if some and coarse.rounded:
        notes.append(
            "Values of rows are rounded to 255 steps of their square root; statistics come from "
            "windows, and are not rounded."
        )
    if coarse.windows > 1:
        notes.append(f"Up to {coarse.windows} recorded windows are added up to one.")
    if "token_text" not in recording.coords or not any(map(any, recording.token_text.values)):
        notes.append("Tokens have no texts: record with a tokenizer.")
    if "experts" in recording.coords and (recording.experts.values > 1).any():
        notes.append("In a mixture of experts, the same fraction of each expert is kept.")
    return notes
