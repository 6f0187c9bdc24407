"""Windowed moments: all that is kept of a sequence's FF activations.

For one FF block, :class:`Moments` holds, per sequence, window and neuron, the sums over
the window's tokens of ``r ** 2`` (energy), of ``r`` (mass) and, if asked for, of the
standardised ranks of ``r``, where ``r = |z| / ||z||_2`` is the relative activation of
Dong, Chen and Chi (2024, arXiv 2404.01365, section 3). Moments add up: over windows,
over chunks of a prefill, over batches and processes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Tokens that a CPU sums at a time, so that what is computed in between stays in its cache.
_SLICE = 256


def window_counts(prompts: list[int], totals: list[int], window: int | None) -> tuple[int, int]:
    """Windows of the longest prompt beside the first token, and of the longest generation."""
    step = window or max(totals)
    new = max(total - prompt for prompt, total in zip(prompts, totals, strict=True))
    return -(-(max(prompts) - 1) // step), -(-new // step)


class Routed(NamedTuple):
    """Activations of a mixture of experts: of each token, those of the experts it is routed to.

    Attributes
    ----------
    z : Tensor, shape (..., slot, d)
        Input of the down-projection of the expert in each of a token's slots, whose neurons
        are `d`.
    expert : Tensor of int64, shape (..., slot)
        Number of that expert.
    experts : int
        How many there are.
    filled : Tensor of bool, shape (..., slot), or None
        Which slots are in use; all if None. In others, z is zero.
    """

    z: Tensor
    expert: Tensor
    experts: int
    filled: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """That of :meth:`dense`."""
        return (*self.expert.shape[:-1], self.experts * self.z.shape[-1])

    def reshape(self, *tokens: int) -> Routed:
        """The same with other dimensions before the slots."""
        z, expert = (x.reshape(*tokens, *x.shape[-n:]) for x, n in ((self.z, 2), (self.expert, 1)))
        filled = self.filled
        if filled is not None:
            filled = filled.reshape(*tokens, filled.shape[-1])
        return Routed(z, expert, self.experts, filled)

    def dense(self) -> Tensor:
        """All experts' neurons side by side, shape (..., experts * d), zero where not routed."""
        full = self.z.new_zeros(*self.expert.shape[:-1], self.experts, self.z.shape[-1])
        return full.scatter(-2, self.expert[..., None].expand_as(self.z), self.z).flatten(-2)

    def of(self, dense: Tensor) -> Tensor:
        """What stands in `dense` at the experts that each token is routed to, shaped as `z`."""
        full = dense.unflatten(-1, (self.experts, -1))
        return full.gather(-2, self.expert[..., None].expand_as(self.z))


class Layout(NamedTuple):
    """Windows, the same for all sequences: the first token, the prompt's, the generation's."""

    phase: list[str]
    start: list[int]
    window: Tensor  # int64 (sequence, token): each token's window, -1 for padding

    @classmethod
    def of(cls, prompts: list[int], totals: list[int], window: int | None) -> Layout:
        """From each sequence's tokens of prompt, and of prompt and generation together."""
        step = window or max(totals)
        rest, new = window_counts(prompts, totals, window)
        phase = ["first"] + ["prompt"] * rest + ["generation"] * new
        start = [0] + [1 + step * k for k in range(rest)] + [step * k for k in range(new)]
        token = torch.arange(max(totals), device="cpu")[None]
        prompt = torch.tensor(prompts, device="cpu")[:, None]
        total = torch.tensor(totals, device="cpu")[:, None]
        number = torch.where(
            token < prompt, 1 + (token - 1) // step, 1 + rest + (token - prompt) // step
        )
        number = torch.where(token == 0, 0, number)
        return cls(phase, start, torch.where(token < total, number, -1))


@dataclass(frozen=True)
class Windows:
    """Which token of a chunk belongs to which window, as the matrix that sums them.

    Attributes
    ----------
    weights : Tensor of float32, shape (sequence, windows here, token)
        1 where the token lies in the window, else 0; padding lies in none.
    first : int
        Number of the first of these windows.
    padding : Tensor of bool, shape (sequence, token), or None
        Where tokens are not real; None if all are.
    spans : list of (slice, slice)
        Pieces of the chunk, and for each the windows that its tokens lie in.
    pieces : flocking.kernels.Pieces, or None
        The same for kernels, where there are some.
    """

    weights: Tensor
    first: int
    padding: Tensor | None
    spans: list[tuple[slice, slice]]
    pieces: Any = None
    _sent: dict[torch.device, Windows] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, window: Tensor) -> Windows:
        """From each token's window, int64 of shape (sequence, token), -1 for padding."""
        _, everything = _span(window, slice(None), 0)
        numbers = torch.arange(everything.start, everything.stop, device="cpu")
        step = max(1, _SLICE // window.shape[0])
        pieces = (slice(start, start + step) for start in range(0, window.shape[1], step))
        padding = window < 0
        return cls(
            (window[:, None, :] == numbers[None, :, None]).to(torch.float32),
            everything.start,
            padding if bool(padding.any()) else None,
            [_span(window, piece, everything.start) for piece in pieces],
        )

    def to(self, device: torch.device) -> Windows:
        """The same for activations on `device`, in one piece unless that is the CPU.

        Sent there once: what all layers share must not hold each of them up.
        """
        kernels = _kernels(device.type)
        if self.pieces is not None or (device.type == "cpu" and kernels is None):
            return self
        if device not in self._sent:
            padding = None if self.padding is None else self.padding.to(device)
            last = self.first + self.weights.shape[1]
            spans = [(slice(None), slice(self.first, last))]
            pieces = None
            if kernels is not None:
                if self.weights.shape[1]:
                    numbers = self.first + self.weights.argmax(dim=1)
                else:  # nothing but padding
                    numbers = torch.full(self.weights.shape[::2], -1, device="cpu")
                if self.padding is not None:
                    numbers = numbers.masked_fill(self.padding, -1)
                pieces = kernels.Pieces.of(numbers, device)
            self._sent[device] = Windows(
                self.weights.to(device), self.first, padding, spans, pieces
            )
        return self._sent[device]


@functools.cache
def _kernels(device: str) -> ModuleType | None:
    """The module of that name, on devices that it is for, if Triton is there."""
    if device != "cuda":
        return None
    try:
        from flocking import kernels
    except ImportError:  # it comes with torch's CUDA builds, but not with all
        return None
    return kernels


def _span(window: Tensor, tokens: slice, first: int) -> tuple[slice, slice]:
    """These tokens, and the windows from the lowest to the highest that they lie in."""
    real = window[:, tokens][window[:, tokens] >= 0]
    if not real.numel():
        return tokens, slice(first, first)
    return tokens, slice(int(real.min()), int(real.max()) + 1)


@dataclass
class Moments:
    """Sums over windows of one FF block's relative activations, in float32.

    Attributes
    ----------
    energy, mass : Tensor of float32, shape (sequence, window, neuron)
        Sums of ``r ** 2`` and of ``r``; unitless. Energy summed over neurons is the
        window's number of tokens (those whose activations are not all zero).
    rank : Tensor of float32, shape (sequence, window, neuron), or None
        Sums of each token's ranks over the neurons, ties averaged, standardised to mean
        0 and length 1 (so that the product of two tokens' is Spearman's correlation).
    routed : Tensor of float32, shape (sequence, window, expert), or None
        Number of tokens that were routed to each expert of a mixture.
    """

    energy: Tensor
    mass: Tensor
    rank: Tensor | None = None
    routed: Tensor | None = None

    @classmethod
    def zeros(
        cls,
        sequences: int,
        windows: int,
        d_ff: int,
        *,
        ranks: bool = False,
        experts: int | None = None,
        device: torch.device | str | None = None,
    ) -> Moments:
        """Moments of no token yet."""

        def sums(width: int) -> Tensor:
            return torch.zeros((sequences, windows, width), dtype=torch.float32, device=device)

        return cls(
            energy=sums(d_ff),
            mass=sums(d_ff),
            rank=sums(d_ff) if ranks else None,
            routed=None if experts is None else sums(experts),
        )

    @torch.no_grad()
    def update(self, z: Tensor | Routed, windows: Windows) -> tuple[Tensor, Tensor]:
        """Add a chunk of tokens; the activations themselves are not kept.

        Parameters
        ----------
        z : Tensor or Routed, shape (sequence, token, d_ff)
            Input of the down-projection, in any floating dtype; of a mixture of experts, r is
            relative to the norm over all experts that the token is routed to.
        windows : Windows
            Where the chunk's tokens belong, on any device.

        Returns
        -------
        norm, l1 : Tensor of float32, shape (sequence, token)
            ``||z||_2`` (in the activations' own units) and ``a = ||r||_1`` (unitless, at
            most ``sqrt(d_ff)``); 0 at padding. Not finite where ``z`` is not.
        """
        if isinstance(z, Routed):
            windows = windows.to(z.z.device)
            if self.routed is not None:
                self._count(z, windows)
            if self.rank is None:
                return self._add_routed(z, windows)
            z = z.dense()
        windows = windows.to(z.device)
        if windows.pieces is not None and self.rank is None:
            add = _kernels(z.device.type).add
            return add(z, windows.pieces, self.energy, self.mass)
        pieces = []
        for tokens, here in windows.spans:
            padding = None if windows.padding is None else windows.padding[:, tokens]
            rows = slice(here.start - windows.first, here.stop - windows.first)
            weights = windows.weights[:, rows, tokens]
            pieces.append(self._add(z[:, tokens], weights, here, padding))
        if len(pieces) == 1:
            return pieces[0]
        norms, l1s = zip(*pieces, strict=True)
        return torch.cat(norms, dim=1), torch.cat(l1s, dim=1)

    def _add(
        self, z: Tensor, weights: Tensor, here: slice, padding: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        z = z.float()
        if padding is not None:  # whatever stands there, NaN included, must not count
            z = z.masked_fill(padding[..., None], 0)
        # Dividing the few weights by the norm, instead of all of z, and one buffer for both
        # powers of z: a quarter of the time saved. Squares are in range for |z| < 1e19.
        powers = z.square()
        norm = powers.sum(dim=-1).sqrt_()
        # A token whose activations are all zero has r = 0 and counts as no token. (Of smaller
        # norms than this, the squares would not be in range.)
        divisor = norm.clamp_min(1e-18)
        weights = weights / divisor[:, None]
        # (In place, also because autocast, where it is on, leaves such products in float32.)
        self.energy[:, here].baddbmm_(weights.square(), powers)
        torch.abs(z, out=powers)
        self.mass[:, here].baddbmm_(weights, powers)
        l1 = powers.sum(dim=-1).div_(divisor)
        if self.rank is not None:  # of z as of r, which only differs by a factor
            member = (weights != 0).float()
            self.rank[:, here].baddbmm_(member, standardised_ranks(powers))
        return norm, l1

    def _add_routed(self, routed: Routed, windows: Windows) -> tuple[Tensor, Tensor]:
        """The same without the zeros of experts that a token is not routed to."""
        z = routed.z.float()
        if windows.padding is not None:
            z = z.masked_fill(windows.padding[..., None, None], 0)
        norm = z.square().sum(dim=(-1, -2)).sqrt_()
        divisor = norm.clamp_min(1e-18)
        r = z.abs() / divisor[..., None, None]
        place = (self._places(windows) * routed.experts + routed.expert).flatten()
        for sums, values in ((self.energy, r.square()), (self.mass, r)):
            rows = sums.view(-1, z.shape[-1])  # (sequence, window, expert) x its neurons
            rows.index_put_((place,), values.flatten(0, 2), accumulate=True)
        return norm, r.sum(dim=(-1, -2))

    def _count(self, routed: Routed, windows: Windows) -> None:
        """Tokens by the experts that they are routed to."""
        real = windows.weights.sum(dim=1).to(self.routed.dtype)
        place = (self._places(windows) * routed.experts + routed.expert).flatten()
        each = real[..., None].expand(routed.expert.shape)
        if routed.filled is not None:
            each = each * routed.filled
        each = each.flatten()
        self.routed.view(-1).index_put_((place,), each, accumulate=True)

    def _places(self, windows: Windows) -> Tensor:
        """Number, over all sequences, of each token's window, shape (sequence, token, 1)."""
        window = windows.first + windows.weights.argmax(dim=1)
        sequence = torch.arange(len(window), device=window.device)[:, None]
        return (sequence * self.energy.shape[1] + window)[..., None]

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets of tokens, of the same sequences and windows.

        Raises
        ------
        ValueError
            If the shapes differ, or only one of the two has ranks.
        """
        if self.energy.shape != other.energy.shape:
            raise ValueError(
                f"moments of shape {tuple(self.energy.shape)} and {tuple(other.energy.shape)} "
                "(sequence, window, neuron) do not add up: record both with the same windows."
            )
        if (self.rank is None) != (other.rank is None):
            raise ValueError("only one of the two moments has ranks: record both with ranks.")
        if (self.routed is None) != (other.routed is None):
            raise ValueError("only one of the two moments is of a mixture of experts.")
        mine, theirs = self.state_dict(), other.state_dict()
        return Moments(**{name: value + theirs[name] for name, value in mine.items()})

    def state_dict(self) -> dict[str, Tensor]:
        """The sums by name, for ``safetensors`` or a message to another process."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor]) -> Moments:
        """The inverse of :meth:`state_dict`."""
        return cls(**state)


def standardised_ranks(r: Tensor) -> Tensor:
    """Ranks over the last axis, ties averaged, shifted to mean 0 and scaled to length 1.

    Ties share their mean rank, so that a ReLU model's many zeros agree with nothing by
    the accident of their order. Where all values are equal the result is 0.
    """
    ascending = r.sort(dim=-1).values
    below = torch.searchsorted(ascending, r.contiguous())
    upto = torch.searchsorted(ascending, r.contiguous(), right=True)
    centred = (below + upto).to(r.dtype) / 2 - r.shape[-1] / 2
    length = torch.linalg.vector_norm(centred, dim=-1, keepdim=True)
    return centred / length.masked_fill(length == 0, 1)
