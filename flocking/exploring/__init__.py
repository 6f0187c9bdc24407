"""A recording looked at in a browser: ``flocking.explore``.

Python sends what a page cannot compute from less (``packing``), in runs of windows and tokens where
there is too much of it (``coarsening``); ``explorer.js`` draws it and does the arithmetic of
:func:`flocking.statistic`, :func:`flocking.select` and :func:`flocking.captured_energy`. The same
module runs in a notebook (``live``) and in a page that was saved (``page``). Imports ``analysis``,
``recording``, ``drawing``, ``plotting`` and ``artifacts``.
"""

from flocking.exploring.showing import Explorer, explore

__all__ = ["Explorer", "explore"]
