"""What changed in a figure's numbers since the last commit of the repository that it is in."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import xarray as xr


def committed(path: Path) -> str | None:
    """The text of a file as git HEAD has it; None without git, a repository or that file in it."""
    try:
        shown = subprocess.run(
            ["git", "show", f"HEAD:./{path.name}"],
            cwd=path.parent,
            capture_output=True,
            check=False,
        )
    except OSError:
        return None
    return shown.stdout.decode(errors="replace") if shown.returncode == 0 else None


def changes(before: xr.Dataset, now: xr.Dataset) -> list[str]:
    """What differs between two versions of a figure's numbers, in words, by variable.

    Of numbers, the largest absolute change, and the largest change relative to the number before;
    where that was 0, there is none. Attributes, such as the caption, do not count.
    """
    names = list(dict.fromkeys([*before.variables, *now.variables]))
    told = []
    for name in names:
        if name not in now.variables:
            told.append(f"{name}: gone")
        elif name not in before.variables:
            told.append(f"{name}: new")
        elif change := _change(before.variables[name], now.variables[name]):
            told.append(f"{name}: {change}")
    return told


def _change(before: xr.Variable, now: xr.Variable) -> str | None:
    if before.sizes != now.sizes:
        return f"shape {dict(before.sizes)} -> {dict(now.sizes)}"
    old, new = before.values, now.values
    if not all(np.issubdtype(values.dtype, np.number) for values in (old, new)):
        return None if (old == new).all() else "other values"
    old, new = old.astype(float), new.astype(float)
    unlike = np.isnan(old) != np.isnan(new)
    gap = np.abs(np.nan_to_num(new) - np.nan_to_num(old))[~unlike]
    parts = []
    if gap.any():
        base = np.abs(np.nan_to_num(old))[~unlike]
        share = np.max(gap[base > 0] / base[base > 0], initial=0)
        parts.append(f"at most {gap.max():.2g}, {share:.2g} of the number before")
    if unlike.any():
        parts.append(f"{unlike.sum()} numbers are missing in one of the two")
    return "; ".join(parts) or None
