"""Windowed moments: what is kept of a sequence's FF activations.

For one FF block, :class:`Moments` holds, per sequence, window and neuron, the sums over
the window's tokens of ``r ** 2`` (energy), of ``r`` (mass) and, if asked for, of the
standardised ranks of ``r``, where ``r = |z| / ||z||_2`` is the relative activation of
Dong, Chen and Chi (2024, arXiv 2404.01365, section 3). Moments add up: over windows,
over chunks of a prefill, over batches and processes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flocking.feedforward import Routed
from flocking.models import full_precision
from flocking.recording.windows import Windows, kernels_for


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

    Examples
    --------
    >>> import torch
    >>> from flocking.recording import Windows
    >>> window = torch.tensor([[0, 1, 1, 1]])  # one sequence of four tokens in two windows
    >>> moments = flocking.Moments.zeros(sequences=1, windows=2, d_ff=64)
    >>> norm, l1 = moments.update(torch.randn(1, 4, 64), Windows.of(window))
    >>> moments.energy.shape
    torch.Size([1, 2, 64])
    >>> moments.energy.sum(-1)  # tokens in each window
    tensor([[1.0..., 3.0...]])
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
        """Moments without any token yet."""

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
        """Add a chunk of tokens, without keeping the activations themselves.

        Parameters
        ----------
        z : Tensor or Routed, shape (sequence, token, d_ff)
            Input of the down-projection, in any floating dtype. In a mixture of experts, r is
            relative to the norm over all experts that the token is routed to.
        windows : Windows
            Windows of the chunk's tokens, on any device.

        Returns
        -------
        norm, l1 : Tensor of float32, shape (sequence, token)
            ``||z||_2`` (in the activations' own units) and ``a = ||r||_1`` (unitless, at
            most ``sqrt(d_ff)``); 0 at padding. Not finite where ``z`` is not.
        """
        if isinstance(z, Routed):
            windows = windows.to(z.z.device)
            if self.routed is not None:
                self._count(z, windows, self.routed)
            if self.rank is None:
                return self._add_routed(z, windows)
            z = z.dense()
        windows = windows.to(z.device)
        kernels = kernels_for(z.device.type)
        if kernels is not None and windows.pieces is not None and self.rank is None:
            return kernels.add(z, windows.pieces, self.energy, self.mass)
        pieces = []
        for tokens, here in windows.spans:
            padding = None if windows.padding is None else windows.padding[:, tokens]
            rows = slice(here.start - windows.first, here.stop - windows.first)
            weights = windows.weights[:, rows, tokens]
            with full_precision():
                pieces.append(self._add(z[:, tokens], weights, here, padding))
        if len(pieces) == 1:
            return pieces[0]
        norms, l1s = zip(*pieces, strict=True)
        return torch.cat(norms, dim=1), torch.cat(l1s, dim=1)

    def _add(
        self, z: Tensor, weights: Tensor, here: slice, padding: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        z = z.float()
        if padding is not None:  # values there, NaN included, must not count
            z = z.masked_fill(padding[..., None], 0)
        # Dividing the few weights by the norm, instead of all of z, and one buffer for both
        # powers of z: a quarter of the time saved. Squares are in range for |z| < 1e19.
        powers = z.square()
        norm = powers.sum(dim=-1).sqrt_()
        # Where all activations are zero, r is zero and the token does not count. (Squares of
        # norms below this limit would not be in range.)
        divisor = norm.clamp_min(1e-18)
        weights = weights / divisor[:, None]
        # (In place, also because autocast leaves products in place in float32.)
        self.energy[:, here].baddbmm_(weights.square(), powers)
        torch.abs(z, out=powers)
        self.mass[:, here].baddbmm_(weights, powers)
        l1 = powers.sum(dim=-1).div_(divisor)
        if self.rank is not None:  # ranks of z are those of r, which differs by a factor
            member = (weights != 0).float()
            self.rank[:, here].baddbmm_(member, standardised_ranks(powers))
        return norm, l1

    def _add_routed(self, routed: Routed, windows: Windows) -> tuple[Tensor, Tensor]:
        """Add a chunk without the zeros of experts that a token is not routed to."""
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

    def _count(self, routed: Routed, windows: Windows, counts: Tensor) -> None:
        """Count tokens by the experts that they are routed to."""
        real = windows.weights.sum(dim=1).to(counts.dtype)
        place = (self._places(windows) * routed.experts + routed.expert).flatten()
        each = real[..., None].expand(routed.expert.shape)
        if routed.filled is not None:
            each = each * routed.filled
        each = each.flatten()
        counts.view(-1).index_put_((place,), each, accumulate=True)

    def _places(self, windows: Windows) -> Tensor:
        """Number, over all sequences, of each token's window, shape (sequence, token, 1)."""
        weights = windows.weights
        if weights.shape[1] == 0:  # padding alone is in no window, and adds nothing to any
            weights = weights.new_zeros(len(weights), 1, weights.shape[2])
        window = windows.first + weights.argmax(dim=1)
        sequence = torch.arange(len(window), device=window.device)[:, None]
        return (sequence * self.energy.shape[1] + window)[..., None]

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets of tokens, of the same sequences and windows.

        Raises
        ------
        ValueError
            If the shapes differ, or only one of the two has ranks or counts of experts.
        """
        if self.energy.shape != other.energy.shape:
            raise ValueError(
                f"expected moments of shape {tuple(self.energy.shape)} (sequence, window, neuron), "
                f"got {tuple(other.energy.shape)}: record both with the same windows."
            )
        if (self.rank is None) != (other.rank is None):
            raise ValueError("only one of the two moments has ranks: record both with ranks=True.")
        if (self.routed is None) != (other.routed is None):
            raise ValueError(
                "only one of the two moments counts experts: merge moments of one block only."
            )
        mine, theirs = self.state_dict(), other.state_dict()
        return Moments(**{name: value + theirs[name] for name, value in mine.items()})

    def __add__(self, other: object) -> Moments:
        """As :meth:`merge`, so that ``sum`` of several is that of all tokens."""
        if isinstance(other, int) and other == 0:  # where sum() begins
            return Moments(**self.state_dict())
        return self.merge(other) if isinstance(other, Moments) else NotImplemented

    __radd__ = __add__

    def state_dict(self) -> dict[str, Tensor]:
        """The sums by name, for ``safetensors`` or a message to another process."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor]) -> Moments:
        """The inverse of :meth:`state_dict`."""
        return cls(**state)


def standardised_ranks(r: Tensor) -> Tensor:
    """Ranks over the last axis, ties averaged, shifted to mean 0 and scaled to length 1.

    Ties share their mean rank, so that the order of a ReLU model's many zeros, which is
    arbitrary, does not correlate with anything. Where all values are equal, the result is 0.
    """
    ascending = r.sort(dim=-1).values
    below = torch.searchsorted(ascending, r.contiguous())
    upto = torch.searchsorted(ascending, r.contiguous(), right=True)
    centred = (below + upto).to(r.dtype) / 2 - r.shape[-1] / 2
    length = torch.linalg.vector_norm(centred, dim=-1, keepdim=True)
    return centred / length.masked_fill(length == 0, 1)
