"""Locating what may be an FF block, by structure alone: shapes and places of projections.

There is no table of architectures: a candidate is an up-projection (with a gate, fused or not)
and a down-projection around one tensor of width ``d_ff``. Attention's value and output
projections are candidates too; ``proof.py`` proves which candidates are blocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from flocking.feedforward.moe import is_experts, shape
from flocking.feedforward.projections import projections_in, width


class Candidate(NamedTuple):
    """Paths, inside one layer, of what may be an FF block."""

    down: str
    ups: tuple[str, ...]  # one, or two of which one is the gate
    d_ff: int
    fused: bool = False
    interleaved: bool = False
    experts: int = 1  # of a mixture; `d_ff` counts the neurons of all

    @property
    def scope(self) -> str:
        """Path of the smallest module that holds all of the projections."""
        parts = [path.split(".")[: -1 if self.ups else None] for path in (self.down, *self.ups)]
        shared = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*parts, strict=False))
        return ".".join(names[0] for names in shared)

    def __str__(self) -> str:
        """Its name in errors: ``gate + up -> down``."""
        if not self.ups:
            return f"{self.down} ({self.experts} experts)"
        layout = (" (interleaved)" if self.interleaved else " (fused)") if self.fused else ""
        return f"{' + '.join(self.ups)}{layout} -> {self.down}"


def layers_of(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The elements of the outermost module lists, which are a model's layers, by path."""
    for name, child in module.named_children():
        path = f"{prefix}.{name}" if prefix else name
        if isinstance(module, nn.ModuleList) and not isinstance(child, nn.ModuleList):
            yield path, child
        else:
            yield from layers_of(child, path)


def candidates_in(layer: nn.Module) -> Iterator[Candidate]:
    """Every set of projections in `layer` with the structure of an FF block.

    For each possible down-projection (d_ff -> d), the up-projections (d -> d_ff, or
    d -> 2 d_ff if fused) are looked for in the smallest module around it that has any.
    """
    for path, module in layer.named_modules():
        yield from candidates_of((path,), [module])
    found = projections_in(layer)
    widths = {path: size for path, module in found.items() if (size := width(module))}
    for down, (d_ff, d) in widths.items():
        if d_ff < 2:
            continue
        scope = down
        single: list[str] = []
        fused: list[str] = []
        while scope and not (single or fused):
            scope = scope.rpartition(".")[0]
            near = [p for p in widths if p != down and (not scope or p.startswith(scope + "."))]
            single = [path for path in near if widths[path] == (d, d_ff)]
            fused = [path for path in near if widths[path] == (d, 2 * d_ff)]
        for ups in (*zip(single), *zip(fused), *itertools.combinations(single, 2)):
            yield from candidates_of((down, *ups), [found[path] for path in (down, *ups)])


def candidates_of(paths: tuple[str, ...], modules: list[nn.Module]) -> Iterator[Candidate]:
    """The candidates that a down-projection and its up-projections, or a mixture alone, make."""
    (down, *ups), (last, *firsts) = paths, modules
    if not ups and is_experts(last):
        experts, d = shape(last)
        yield Candidate(down, (), experts * d, experts=experts)
    sizes = [width(module) for module in firsts]
    if (size_of_last := width(last)) is None or not sizes:
        return
    d_ff, d = size_of_last
    if len(ups) <= 2 and all(size == (d, d_ff) for size in sizes):
        yield Candidate(down, tuple(ups), d_ff)
    elif sizes == [(d, 2 * d_ff)]:
        for interleaved in (False, True):
            yield Candidate(down, tuple(ups), d_ff, fused=True, interleaved=interleaved)
