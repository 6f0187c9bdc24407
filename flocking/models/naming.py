"""What a model is called, apart from where its files lie: a disk is its owner's business."""

from __future__ import annotations

import os
import re
from pathlib import PurePosixPath, PureWindowsPath

from transformers import PreTrainedModel

from flocking.models.checkpoints import folder_of

# The hub's cache: models--organisation--name/snapshots/commit.
_SNAPSHOT = re.compile(r"models--(?P<id>[^/\\]+)[/\\]snapshots[/\\][^/\\]+[/\\]*$")
_CONTROL = re.compile(r"(?P<words>random weights \(seed -?\d+\) like )(?P<of>.*)", re.DOTALL)


def control_name(model: PreTrainedModel, seed: int) -> str:
    """What :func:`flocking.control` calls a model's control."""
    return f"random weights (seed {seed}) like {name_and_path(model)[0]}"


def name_and_path(model: PreTrainedModel) -> tuple[str, str]:
    """A model's name, and the folder that it was read from.

    Returns
    -------
    name : str
        A hub id, the last part of a folder's path, or the words for a control.
    path : str
        Absolute, with ``~`` for the user's folder; empty if it was read from a hub or made.
    """
    given = str(getattr(model, "name_or_path", None) or "")
    folder = folder_of(model)
    if folder is None and given and os.path.isdir(given):
        return split_place(os.path.abspath(given))
    return split_place(given if folder is None else str(folder))


def split_place(place: str) -> tuple[str, str]:
    """The same of what ``name_or_path`` was, as older recordings hold it."""
    if control := _CONTROL.fullmatch(place):
        return control["words"] + split_place(control["of"])[0], ""
    absolute = any(kind(place).is_absolute() for kind in (PurePosixPath, PureWindowsPath))
    if not absolute and not place.startswith((".", "~")):
        return place, ""
    snapshot = _SNAPSHOT.search(place)
    name = snapshot["id"].replace("--", "/", 1) if snapshot else PureWindowsPath(place).name
    home = os.path.expanduser("~").rstrip(os.sep)
    if home and (place == home or place.startswith(home + os.sep)):
        place = "~" + place[len(home) :]
    return name or place, place
