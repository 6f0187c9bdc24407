"""The widget: the page's module in a notebook, which asks for one layer of a text at a time."""

from __future__ import annotations

from typing import Any

import anywidget
import traitlets

from flocking.exploring.packing import Source
from flocking.exploring.page import as_json, asset, described


class Widget(anywidget.AnyWidget):
    """The explorer as a widget.

    Parameters
    ----------
    source : Source
        What it shows.
    """

    _esm = asset("explorer.js")
    _css = asset("explorer.css")
    about = traitlets.Unicode().tag(sync=True)

    def __init__(self, source: Source) -> None:
        super().__init__(about=as_json(described(source)))
        self._source = source
        self.on_msg(self._answer)

    def _answer(self, _: object, message: Any, buffers: object) -> None:
        """Send what the page asks for, or why not: an error here would be seen by nobody."""
        key = message.get("key") if isinstance(message, dict) else None
        try:
            packet = self._source.packet(str(key))
        except Exception as problem:
            self.send({"key": key, "error": f"{type(problem).__name__}: {problem}"})
            return
        self.send({"key": key, "content": as_json(packet.content)}, packet.buffers)
