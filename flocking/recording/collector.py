"""What the hooks hand out, summed batch by batch into the arrays of a recording."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from flocking.feedforward import FeedForward, Routed
from flocking.recording.dataset import empty, variables_of
from flocking.recording.moments import Moments
from flocking.recording.windows import Layout, Windows


class Collector:
    """A callback for hooks that sums each block's ``z`` by window, over all batches.

    Call :meth:`begin` for each batch, :meth:`expect` before and :meth:`check` after each of its
    forward passes, and :meth:`end` when it has been read.

    Attributes
    ----------
    blocks, raw : list of FeedForward
        Blocks to record, and those of them whose relative activations are kept.
    layout : Layout
        Windows of all sequences.
    arrays : dict of numpy.ndarray
        Variables of the recording, by name.
    """

    def __init__(
        self, blocks: list[FeedForward], raw: list[FeedForward], layout: Layout, ranks: bool
    ) -> None:
        self.blocks, self.raw, self.layout, self.ranks = blocks, raw, layout, ranks
        sequences, tokens = layout.window.shape
        sizes = {
            "sequence": sequences,
            "layer": len(blocks),
            "window": len(layout.phase),
            "neuron": max(block.d_ff for block in blocks),
            "token": tokens,
            "routed_expert": max(block.experts for block in blocks),
            "relative_layer": len(raw),
        }
        self.arrays = empty(variables_of(blocks, raw, ranks), sizes)
        for row, window in enumerate(layout.window):
            counts = torch.bincount(window[window >= 0], minlength=len(layout.phase))
            self.arrays["tokens"][row] = counts.numpy()

    def begin(self, rows: list[int]) -> None:
        """Start a batch of these sequences."""
        self.batch = _Batch(self.blocks, rows, self.layout, self.ranks)

    def expect(self, tokens: slice) -> None:
        """Announce that the next forward pass reads these tokens of the batch."""
        self.batch.expect(tokens)

    def __call__(self, block: FeedForward, z: Tensor | Routed) -> None:
        """Take a block's activations in the current pass."""
        z = self.batch.in_rows(block, z)
        norm = self.batch.add(block, z)
        if block in self.raw:
            self._keep_relative(block, z.dense() if isinstance(z, Routed) else z, norm)

    def check(self) -> None:
        """Check, after a forward pass, that every block ran in it exactly once."""
        self.batch.check()

    def end(self) -> None:
        """Write the batch's sums into the arrays."""
        real, rows = self.batch.real, self.batch.rows
        for number, block in enumerate(self.blocks):
            norm, l1 = self.batch.norms[block].cpu()
            _check_finite(norm, real, block, rows)
            here = (rows, number, slice(norm.shape[1]))
            self.arrays["norm"][here] = norm.masked_fill(~real, torch.nan)
            self.arrays["l1"][here] = l1.masked_fill(~real, torch.nan)
            _check_energy(self.batch.moments[block].energy, norm, self.batch, block)
            for name, value in self.batch.moments[block].state_dict().items():
                windows = self.batch.own[None, :].numpy()
                place = (np.array(rows)[:, None], number, windows, slice(value.shape[-1]))
                self.arrays[name][place] = value.cpu()
        del self.batch  # before the next one is made

    def _keep_relative(self, block: FeedForward, z: Tensor, norm: Tensor) -> None:
        r = z.float().abs() / norm.masked_fill(norm == 0, 1)[..., None]
        padding = self.batch.windows.padding
        if padding is not None:
            r.masked_fill_(padding.to(r.device)[..., None], torch.nan)
        here = (self.batch.rows, self.raw.index(block), self.batch.tokens, slice(block.d_ff))
        self.arrays["relative"][here] = r.half().cpu()


@dataclass
class _Batch:
    """Sums over one batch of sequences, on each block's own device.

    Everything is allocated before the first pass: these small tensors, allocated one by one
    between the large ones that a pass frees again, would keep that memory from being reused. There
    are sums for the windows that these sequences have, which may be far fewer than the longest of
    all texts has.
    """

    blocks: list[FeedForward]
    rows: list[int]
    layout: Layout
    ranks: bool
    passes: int = field(default=0, init=False)
    tokens: slice = field(init=False)  # that the current pass reads, and their windows
    windows: Windows = field(init=False)

    def __post_init__(self) -> None:
        window = self.layout.window[self.rows]
        window = window[:, : int((window >= 0).sum(1).max())]
        self.real = window >= 0
        self.own = window[self.real].unique()  # numbers of the windows, ascending
        self.window = torch.searchsorted(self.own, window.contiguous()).masked_fill(~self.real, -1)
        self.calls = dict.fromkeys(self.blocks, 0)
        self.moments = {
            block: Moments.zeros(
                len(self.rows),
                len(self.own),
                block.d_ff,
                ranks=self.ranks,
                experts=block.experts if block.kind == "experts" else None,
                device=block.device,
            )
            for block in self.blocks
        }
        self.norms = {
            block: torch.zeros((2, *self.real.shape), dtype=torch.float32, device=block.device)
            for block in self.blocks
        }

    def expect(self, tokens: slice) -> None:
        self.tokens = tokens
        self.windows = Windows.of(self.window[:, tokens])
        self.passes += 1

    def in_rows(self, block: FeedForward, z: Tensor | Routed) -> Tensor | Routed:
        """The activations of the pass's tokens, as (sequence, token, ...)."""
        n, tokens = self.windows.weights.shape[::2]
        if block.offset is not None and isinstance(z, Tensor) and z.shape[1] != tokens:
            z = z[:, block.offset : block.offset + tokens]  # some rows stand for no token
        if z.shape[:-1] not in ((n, tokens), (n * tokens,)):
            raise RuntimeError(
                f"{block.path}: expected activations of {n} x {tokens} tokens, got "
                f"{tuple(z.shape[:-1])}. This model adds, drops or rearranges tokens, which record "
                "cannot follow."
            )
        # (Some models flatten sequences and tokens into one dimension.)
        return z.reshape(n, tokens) if isinstance(z, Routed) else z.reshape(n, tokens, block.d_ff)

    def add(self, block: FeedForward, z: Tensor | Routed) -> Tensor:
        """Add the pass's activations to the block's sums; give each token's norm."""
        norm, l1 = self.moments[block].update(z, self.windows)
        self.norms[block][:, :, self.tokens] = torch.stack((norm, l1))
        self.calls[block] += 1
        return norm

    def check(self) -> None:
        for block, calls in self.calls.items():
            if calls != self.passes:
                raise RuntimeError(
                    f"{block.path}: expected {self.passes} runs in {self.passes} forward passes, "
                    f"got {calls}. Activations there cannot be assigned to tokens."
                )


def _check_energy(energy: Tensor, norm: Tensor, batch: _Batch, block: FeedForward) -> None:
    """Raise a RuntimeError unless the energy of each window is its number of tokens.

    A relative activation has length 1, so that each token counts as one; one whose activations are
    all zero does not count. Other sums mean that passes were mixed up.
    """
    counts = torch.zeros(energy.shape[:2], dtype=torch.float64, device="cpu")
    counts.scatter_add_(1, batch.window.clamp_min(0), ((norm > 0) & batch.real).double())
    sums = energy.sum(dim=-1, dtype=torch.float64).cpu()
    if bool(((sums - counts).abs() > 1e-2 * counts).any()):
        raise RuntimeError(
            f"{block.path}: the energy of some windows is not their number of tokens, so that its "
            "activations were not those of the texts alone: run nothing else on this model while "
            "it is recorded."
        )


def _check_finite(norm: Tensor, real: Tensor, block: FeedForward, rows: list[int]) -> None:
    bad = (~norm.isfinite() & real).nonzero()
    if len(bad):
        row, token = bad[bad[:, 1].argmin()].tolist()
        raise ValueError(
            f"layer {block.layer} ({block.path}) has activations that are not finite, first at "
            f"token {token} of text {rows[row]}: check the weights, or load the model in float32 "
            "or bfloat16."
        )
