"""From a prompt to the experts in force: what a twin knows beside its modules."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel

from flocking.analysis import magnitude, top_k
from flocking.feedforward import FeedForward, Routed, observe
from flocking.pruning.compact import Compact, refuse
from flocking.pruning.methods import Method
from flocking.pruning.prompt import Read, window_numbers
from flocking.recording import Moments, Windows

Scope = Literal["shared", "sequence"]


class State:
    """What a twin knows beside its modules: how to choose, and what was chosen last."""

    def __init__(
        self,
        whole: PreTrainedModel,
        compacts: list[Compact],
        method: Method,
        scope: Scope,
        seed: int,
    ) -> None:
        self.whole = whole  # the full model that prompts are read by
        self.compacts, self.method, self.scope, self.seed = compacts, method, scope, seed
        self.first = {layer: c.block.layer for c in compacts for layer in c.layers}
        self.read: Read | None = None  # what the experts were chosen from; None without experts
        self.by_cache = WeakIdKeyDictionary()  # what was read into each cache
        self.copies = 1  # how often each sequence is in the batch, as a beam search needs it
        self.unreached: list[Tensor] = []  # experts that no token of the prompt was routed to
        self.watch: _Stopwatch | None = None  # over the last selection and copy
        self.draft: tuple[int, Tensor] | None = None  # where the last one began, and its tokens
        self.drafted = self.accepted = 0

    def note_fate(self, ids: Tensor) -> None:
        """Count how much of the last draft is in the text `ids` that it was made for."""
        if self.draft is not None:
            start, draft = self.draft
            new = draft[0, start:]
            kept = ids[0, start : draft.shape[1]]
            same = (new[: len(kept)] == kept).long().cumprod(dim=0).sum()
            self.drafted, self.accepted = self.drafted + len(new), self.accepted + int(same)
        self.draft = None

    def prefill(
        self,
        run: Callable[[], Any],
        sequences: int,
        mask: Tensor | None,
        past: Any,
        tokens: int | None = None,
    ) -> Any:
        """Run the prompt on the full model, watched; choose the experts and copy them.

        Whatever goes wrong on the way, the twin then has no experts.

        Parameters
        ----------
        run : callable
            One or more forward passes of ``whole``, over the prompt's tokens in order.
        sequences : int
            In the batch.
        mask : Tensor, shape (sequence, token), or None
            1 for real tokens; all if None.
        past : Cache or None
            What the prompt comes on top of.
        tokens : int, optional
            Of each sequence's prompt, if that is known.
        """
        self.forget()
        read = None if past is None else self.by_cache.pop(past, None)
        if read is not None and not read.goes_on(past, sequences):
            read = None
        if read is None:
            self.draft, self.drafted, self.accepted = None, 0, 0
        moments = {} if read is None else read.moments
        first = read is None  # its first token is a window of its own, as in recordings
        seen: dict[int, int] = {}
        windows: dict[tuple[int, int], Windows] = {}
        number = window_numbers(sequences, mask, first)

        def add(block: FeedForward, z: Tensor | Routed) -> None:
            # Some blocks flatten the tokens of all sequences.
            size = () if isinstance(z, Routed) else (z.shape[-1],)
            z = z.reshape(sequences, -1, *size)
            fed = z.shape[1]
            start = seen.get(block.layer, 0)
            seen[block.layer] = start + fed
            if (start, fed) not in windows:
                windows[start, fed] = Windows.of(number(start, fed))
            layer = self.first[block.layer]
            if layer not in moments:
                # Kept for a second turn, which need not be in inference mode if this one is.
                with torch.inference_mode(False):
                    zeros = Moments.zeros(sequences, 2, block.d_ff, device=block.device)
                moments[layer] = zeros
            moments[layer].update(z, windows[start, fed])

        with torch.no_grad(), observe(self.whole, add, routed=True):
            outputs = run()
        fed = next(iter(seen.values()))
        if tokens is not None and set(seen.values()) != {tokens}:
            raise RuntimeError(
                f"{type(self.whole).__name__} was fed {tokens} tokens a sequence and computed "
                f"{fed}: with tokens added, dropped or repeated, no experts can be chosen."
            )
        real = (number(0, fed) >= 0).sum(dim=1)
        read = Read(moments, real if first else read.tokens + real)
        self.choose(read)
        cache = getattr(outputs, "past_key_values", None)
        if cache is not None:
            read.end = int(cache.get_seq_length())
            self.by_cache[cache] = read
        return outputs

    def expect(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Refuse a forward pass without experts, or of other sequences than they are for."""
        if self.read is None:
            refuse()
        inputs = (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        batch = next((len(x) for x in inputs if isinstance(x, Tensor)), None)
        held = len(self.read.tokens)
        if self.scope == "sequence" and batch is not None and held not in (1, batch):
            raise RuntimeError(
                f"this twin holds the experts of {held} sequences, and {batch} were given: call "
                "its generate, which chooses them from the prompts."
            )

    def adopt(self, other: State) -> None:
        """Choose from the prompt that `other`, of another twin of the same model, was given."""
        self.forget()
        self.choose(other.read)

    def forget(self) -> None:
        """No experts are in force: nothing runs until some are chosen."""
        self.read = None
        for compact in self.compacts:
            compact.empty()

    @torch.inference_mode(False)
    @torch.no_grad()
    def choose(self, read: Read) -> None:
        """From the moments to the experts in their compact projections.

        Layers of one shape are worked on together, and the device is asked once, at the end,
        whether all is well: until then work is only handed to it.
        """
        watch = _Stopwatch(self.compacts[0].block.device)
        watch.lap()
        own = self.scope == "sequence"
        # Each sequence draws the same numbers, so that it is in a batch what it is alone, and
        # that a beam goes on with the experts of the beam that it comes from.
        count = len(read.tokens) if own else 1
        generators = [torch.Generator().manual_seed(self.seed) for _ in range(count)]

        def statistics(energy: Tensor) -> Tensor:
            # As flocking.statistic has it: float32 windows, added in float64.
            each = energy.double().sum(dim=2).sqrt()
            if own:
                return each
            share = read.tokens.to(each.device, non_blocking=True).clamp_min(1).rsqrt()
            return (each * share[:, None]).sum(dim=1, keepdim=True)

        energies = [read.moments[compact.block.layer].energy for compact in self.compacts]
        of_layers = _together(statistics, energies)
        finite = _together(lambda each: each.isfinite().flatten(1).all(dim=1), of_layers)
        self.unreached = []
        scores = [
            torch.stack([self._scores(c, *row) for row in zip(each, generators, strict=True)])
            for c, each in zip(self.compacts, of_layers, strict=True)
        ]
        numbers = _together(lambda each: ~each.isnan().flatten(1).any(dim=1), scores)
        counts = [compact.k for compact in self.compacts]
        experts = _together(_largest, scores, counts)
        watch.lap()
        for compact, indices in zip(self.compacts, experts, strict=True):
            compact.fill(indices if own else indices[0])
        watch.lap()
        self.watch = watch
        well = torch.stack([flag.to(finite[0].device) for flag in (*finite, *numbers)])
        for compact, is_finite, is_number in zip(
            self.compacts, *well.view(2, -1).tolist(), strict=True
        ):
            if is_finite and is_number:
                continue
            self.forget()
            layer = compact.block.layer
            raise ValueError(
                f"method returned NaN in layer {layer}: give each neuron a number."
                if is_finite
                else f"activations of layer {layer} are not finite: no experts can be chosen."
            )
        self.read = read

    def _scores(self, compact: Compact, statistic: Tensor, generator: torch.Generator) -> Tensor:
        """The method's, one for each neuron, shape (expert, neuron); one expert if dense."""
        block = compact.block
        if block.kind == "experts":
            statistic = statistic.view(block.experts, -1)
            # Of an expert that no token was routed to, the text says nothing: by its weights.
            unreached = (statistic == 0).all(dim=1, keepdim=True)
            by_weights = magnitude(block).to(statistic).view_as(statistic)
            statistic = torch.where(unreached, by_weights, statistic)
            self.unreached.append(unreached.sum())
        scores = self.method(statistic, compact.k, block, generator)
        if not isinstance(scores, Tensor) or scores.shape != statistic.shape:
            got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            size = " x ".join(map(str, statistic.shape))
            raise ValueError(
                f"method returned {got} where one score for each of {size} neurons is due."
            )
        scores = scores if scores.is_floating_point() else scores.double()
        return scores.view(block.experts, -1)


def _together(
    function: Callable[..., Tensor], tensors: list[Tensor], numbers: list[int] | None = None
) -> list[Tensor]:
    """The function's results for each tensor (and number), those that are alike in one call."""
    numbers = numbers or [0] * len(tensors)
    alike: dict[tuple, list[int]] = {}
    for place, (tensor, number) in enumerate(zip(tensors, numbers, strict=True)):
        alike.setdefault((tensor.shape, tensor.device, tensor.dtype, number), []).append(place)
    results = list(tensors)
    for (*_, number), places in alike.items():
        stacked = torch.stack([tensors[place] for place in places])
        found = function(stacked, number) if number else function(stacked)
        for place, result in zip(places, found, strict=True):
            results[place] = result
    return results


def _largest(scores: Tensor, k: int) -> Tensor:
    """Indices of the `k` neurons of each expert, ascending, numbered through all experts.

    From (..., expert, neuron) to (..., expert * k), without asking the device how many there are.
    """
    kept = top_k(scores, k).to(torch.uint8)
    within = kept.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    first = torch.arange(scores.shape[-2], device=scores.device) * scores.shape[-1]
    return (within + first[:, None]).flatten(-2)


class _Stopwatch:
    """Times on a device's own clock, which waits for nothing; on the host's if it has none."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.laps = device, []

    def lap(self) -> None:
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                self.laps.append(torch.cuda.Event(enable_timing=True))
                self.laps[-1].record()
        else:
            self.laps.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """From lap to lap; waits for the last of them."""
        pairs = zip(self.laps, self.laps[1:], strict=False)
        if self.device.type != "cuda":
            return [end - start for start, end in pairs]
        self.laps[-1].synchronize()
        return [start.elapsed_time(end) / 1000 for start, end in pairs]
