"""GRIFFIN: a model's pruned twin, which prefills in full and decodes on the prompt's experts.

The method of Dong, Chen and Chi (2024, arXiv 2404.01365, section 4): the prompt runs through the
whole model, whose FF neurons are scored by the hook that recording uses; the highest are copied
into compact projections; tokens are generated with those.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel

from flocking.compact import Compact, refuse
from flocking.experts import by_interface
from flocking.feedforward import FeedForward, feedforwards, inherit, shadow_with_blocks
from flocking.hooks import observe
from flocking.moments import Moments, Routed, Windows
from flocking.offloading import offloaded
from flocking.passes import refuse_forgetful, traits
from flocking.projections import is_loaded, is_plain
from flocking.selection import (
    METHODS,
    WITH_REFERENCE,
    Method,
    by_reference,
    expert_count,
    global_local,
    magnitude,
    top_k,
)
from flocking.shadow import shadow, unwrap
from flocking.twin import Twin, twin_class

Scope = Literal["shared", "sequence"]


def griffin(
    model: PreTrainedModel,
    density: float | Iterable[float] = 0.5,
    *,
    method: str | Method = "topk",
    scope: Scope = "shared",
    reference: xr.DataArray | None = None,
    weight: float = 0.5,
    seed: int = 0,
    offload: Literal["cpu"] | None = None,
) -> PreTrainedModel:
    """A twin of `model` whose ``generate`` decodes on the experts of each prompt.

    The twin shares all parameters with `model` but the FF projections, which are compact copies
    of the experts' rows and columns. Each call of ``generate`` runs its prompt through the full
    model, chooses the experts (Dong, Chen and Chi 2024, arXiv 2404.01365, section 4), copies
    them and decodes on those; the first new token is the full model's. `model` is not changed.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A decoder-only model that can generate. Convert it (dtype, device) before, not after.
    density : float or iterable of float
        Fraction of each layer's neurons kept, in (0, 1]; or one for each FF block, in order. (A
        block that runs several times in a forward pass is one, with one selection for all runs.)
    method : str or callable
        Which neurons: "topk" (GRIFFIN), "sampled", "half-sampled", "random", "magnitude",
        "static" or "global-local" (both need `reference`). Or a function of one statistic
        (float64, shape (d_ff,)), the number to keep, the :class:`FeedForward` and a
        ``torch.Generator``, that returns scores of the same shape, the larger the better. (A
        mixture of experts has shape (expert, neuron), and as many neurons of each are kept.)
    scope : {"shared", "sequence"}
        In a batch, one selection for all sequences, from ``sum_b s_b / sqrt(n_b)`` with the
        ``n_b`` real tokens of each (ibid., section 4.3), or each sequence its own, for which
        the compact weights are held once per sequence (and beam).
    reference : xarray.DataArray, (layer, neuron), optional
        The static statistic of "static" and "global-local": :func:`flocking.global_statistic`.
        (Given the statistic of the very text that is to follow, "static" is the oracle.)
    weight : float
        Of the global ranks in "global-local" (GLASS, arXiv 2508.14302).
    seed : int
        Of the methods that draw: the same prompt gives the same experts every time, with
        ``scope="sequence"`` in any batch.
    offload : "cpu", optional
        For a model in host memory that need not fit the accelerator: the twin decodes there, with
        copies of all weights but the FF projections', which stay in host memory and are brought
        over, block by block, to read each prompt. Without an accelerator nothing moves.

    Returns
    -------
    transformers.PreTrainedModel
        Of `model`'s class, with ``selection`` (the experts' indices by layer) and
        ``report()`` besides. Memory rises by the compact projections: nothing of `model` is
        freed (with `offload`, the accelerator's by those and by what is no FF projection). Hooks
        on `model` do not act on the twin, nor the other way round. Values of parameters are
        shared at all times (of copies, those of the time they were made); after any other change
        of `model` (its dtype, its config, parameters that were replaced), make the twin again.

        In a second turn on a cache that this twin filled, the new turn's tokens join the
        statistic of the earlier turns' (their generated tokens, computed pruned, do not count).
        On any other cache, a copy of it, or one that was cut to less than its prompt, the
        experts are chosen from the new tokens alone.

    Raises
    ------
    ValueError
        For a density outside of (0, 1] or that keeps no neuron, an unknown method or scope, a
        reference that is missing or another model's, weights that are quantised or not in
        memory, a model that does not generate or cannot go on from a cache, or a twin; with
        `offload`, for a model that is not in host memory.
    TypeError
        If `density` or `seed` is no number, or `reference` no DataArray.
    UnsupportedModelError
        If the model's FF blocks cannot be located and proved.

    Examples
    --------
    >>> pruned = flocking.griffin(model, density=0.5)
    >>> pruned.generate(**tokenizer("Birds of a feather", return_tensors="pt"))
    """
    model = unwrap(model)
    blocks = _prunable(model)
    if scope not in ("shared", "sequence"):
        raise ValueError(f"scope={scope!r}: give 'shared' or 'sequence'.")
    if scope == "sequence" and (odd := [b for b in blocks if not _is_separable(b)]):
        raise ValueError(
            f"{type(model).__name__} has FF blocks ({odd[0].path}, ...) that are quantised, or "
            "experts that do not follow transformers' interface: there, sequences cannot have "
            "experts of their own; give scope='shared'."
        )
    if not isinstance(seed, int | np.integer):
        raise TypeError(f"seed={seed!r}: give a whole number.")
    if offload not in (None, "cpu"):
        raise ValueError(f"offload={offload!r}: give 'cpu', or leave it out.")
    # Where a block runs several times in a forward pass, all its runs have the same experts.
    firsts = [block for block in blocks if block.call == 0]
    counts = [
        expert_count(each, block.d_ff // block.experts)
        for each, block in zip(_densities(density, len(firsts)), firsts, strict=True)
    ]
    refuse_forgetful(model)
    known = traits(model)
    if offload:
        model = offloaded(model)
        blocks = feedforwards(model)
        firsts = [block for block in blocks if block.call == 0]
    chosen = _method(method, reference, weight, blocks)

    twin = shadow(model)
    paths = {id(module): path for path, module in model.named_modules()}
    compacts = [Compact(twin, block, paths, k) for block, k in zip(firsts, counts, strict=True)]
    for compact in compacts:
        compact.layers = [b.layer for b in blocks if b.down is compact.block.down]
    _become_twin(twin)
    inherit(model, twin)
    whole = shadow_with_blocks(model)
    traits.remember(whole, known)
    twin._griffin = _State(whole, compacts, chosen, scope, int(seed))
    return twin


def _become_twin(copied: PreTrainedModel) -> None:
    """Its class is a twin's, wherever accelerate keeps the forward of the class before."""
    plain = type(copied)
    copied.__class__ = twin_class(plain)
    for name in ("_old_forward", "forward"):
        if getattr(vars(copied).get(name), "__func__", None) is plain.forward:
            vars(copied)[name] = copied.__class__.forward.__get__(copied)


def _prunable(model: PreTrainedModel) -> list[FeedForward]:
    name = type(model).__name__
    if isinstance(model, Twin):
        raise ValueError("model is a twin already: give griffin the original.")
    if not all(map(is_loaded, model.modules())):
        raise ValueError(f"{name} has weights on the meta device, without values: load them first.")
    blocks = feedforwards(model)
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise ValueError(
            f"{name} is no decoder-only model that generates: load it with AutoModelForCausalLM."
        )
    if fixed := [b for b in blocks if not b.prunable or b.offset is not None]:
        raise ValueError(
            f"{name} cannot be pruned, only recorded: in {len(fixed)} FF blocks ({fixed[0].path}, "
            f"...) {_why_fixed(fixed[0])}."
        )
    holders: dict[int, set[tuple[int, str]]] = {}
    for module in model.modules():
        for child, inner in module.named_children():
            holders.setdefault(id(inner), set()).add((id(module), child))
    for block in blocks:
        parts = [part for part in (block.up, block.gate, block.down) if part is not None]
        if any(len(holders[id(part)]) > 1 for part in parts):
            raise ValueError(f"{name} cannot be pruned: {block.path} shares a single projection.")
    return blocks


def _why_fixed(block: FeedForward) -> str:
    """Why a block's neurons cannot be taken out of it."""
    if block.offset is not None:
        return "are given more than the text's tokens"
    odd = [p for p in (block.gate, block.up, block.down) if p is not None and not is_plain(p)]
    if not odd:
        return "neurons depend on each other, as where a norm precedes the down-projection"
    if isinstance(odd[0], nn.Linear):
        packed = odd[0] if type(odd[0].weight) is nn.Parameter else odd[0].weight
        return (
            f"weights are quantised ({type(packed).__name__}) in a way that does not let "
            "one neuron be told from the next: load it unquantised, or quantised row by row, as "
            "torchao's Int8WeightOnlyConfig does"
        )
    kind = f"{type(odd[0]).__module__}.{type(odd[0]).__qualname__}"
    return f"projections are of {kind}: if these are adapters, merge them (merge_and_unload)"


def _is_separable(block: FeedForward) -> bool:
    """Whether sequences can be told apart in the forward pass of its projections."""
    if block.kind == "experts":
        return by_interface(block.down)
    parts = (block.up, block.gate or block.up, block.down)
    return all(map(is_plain, parts)) and not block.token_first


def _densities(density: float | Iterable[float], layers: int) -> list[float]:
    try:
        each = [float(value) for value in np.atleast_1d(density).tolist()]
    except (TypeError, ValueError):
        each = []
    if isinstance(density, str) or not each:
        raise TypeError(f"density={density!r}: give a number, or one for each of {layers}.")
    if np.ndim(density) == 0:
        return each * layers
    if len(each) != layers:
        raise ValueError(f"density has {len(each)} values: give one, or one for each of {layers}.")
    return each


def _method(
    method: str | Method, reference: xr.DataArray | None, weight: float, blocks: list[FeedForward]
) -> Method:
    if callable(method):
        return method
    if method in METHODS:
        return METHODS[method]
    if method not in WITH_REFERENCE:
        known = ", ".join([*METHODS, *WITH_REFERENCE])
        raise ValueError(f"method={method!r}: choose from {known}, or give a function.")
    if reference is None:
        raise ValueError(
            f"method={method!r} needs reference: make it with flocking.global_statistic(model, "
            "texts, tokenizer=tokenizer)."
        )
    if not isinstance(reference, xr.DataArray):
        raise TypeError(
            f"reference is a {type(reference).__name__}: give the DataArray that "
            "flocking.global_statistic returns."
        )
    if not {"layer", "neuron"} == set(reference.dims):
        raise ValueError(f"reference has dimensions {reference.dims}: give (layer, neuron).")
    layers, widest = [block.layer for block in blocks], max(block.d_ff for block in blocks)
    if reference.layer.values.tolist() != layers or reference.sizes["neuron"] != widest:
        raise ValueError(
            f"reference is of {reference.sizes['layer']} layers of {reference.sizes['neuron']} "
            f"neurons, and this model has {len(layers)} of {widest}: make it from this model."
        )
    values = reference.transpose("layer", "neuron").values.astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("reference has values that are not finite: make it from this model.")

    def of(block: FeedForward) -> Tensor:
        runs = [values[row] for row, other in enumerate(blocks) if other.down is block.down]
        return torch.from_numpy(np.sqrt(np.square(runs).sum(axis=0))[: block.d_ff])

    return by_reference(of) if method == "static" else global_local(of, weight)


@dataclass
class _Read:
    """What was read in full: what experts are chosen from.

    Attributes
    ----------
    moments : dict of int to Moments
        By layer.
    tokens : Tensor of int64, shape (sequence,)
        Real tokens in the moments.
    end : int
        Tokens in the cache, padding included, when the last prompt had been read.
    """

    moments: dict[int, Moments]
    tokens: Tensor
    end: int = 0

    def goes_on(self, past: Any, sequences: int) -> bool:
        """Whether the cache `past` still holds what was read, for as many sequences."""
        return len(self.tokens) == sequences and past.get_seq_length() >= self.end


class _State:
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
        self.read: _Read | None = None  # what the experts were chosen from; None without experts
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
        windows: dict[tuple[int, int, torch.device], Windows] = {}
        number = _window_numbers(sequences, mask, first)

        def add(block: FeedForward, z: Tensor | Routed) -> None:
            # Some blocks flatten the tokens of all sequences.
            size = () if isinstance(z, Routed) else (z.shape[-1],)
            z = z.reshape(sequences, -1, *size)
            fed = z.shape[1]
            start = seen.get(block.layer, 0)
            seen[block.layer] = start + fed
            place = (start, fed, block.device)
            if place not in windows:  # sent there once, not once for each layer
                windows[place] = Windows.of(number(start, fed)).to(block.device)
            layer = self.first[block.layer]
            if layer not in moments:
                # Kept for a second turn, which need not be in inference mode if this one is.
                with torch.inference_mode(False):
                    zeros = Moments.zeros(sequences, 2, block.d_ff, device=block.device)
                moments[layer] = zeros
            moments[layer].update(z, windows[place])

        with torch.no_grad(), observe(self.whole, add, routed=True):
            outputs = run()
        fed = next(iter(seen.values()))
        if tokens is not None and set(seen.values()) != {tokens}:
            raise RuntimeError(
                f"{type(self.whole).__name__} was fed {tokens} tokens a sequence and computed "
                f"{fed}: with tokens added, dropped or repeated, no experts can be chosen."
            )
        real = (number(0, fed) >= 0).sum(dim=1)
        read = _Read(moments, real if first else read.tokens + real)
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

    def adopt(self, other: _State) -> None:
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
    def choose(self, read: _Read) -> None:
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


def _window_numbers(
    sequences: int, mask: Tensor | None, first: bool
) -> Callable[[int, int], Tensor]:
    """Windows (0 the first real token, 1 the others, -1 padding) of tokens start to start + n."""
    if mask is not None:
        real = mask.cpu() != 0
        everything = torch.where(real, 1, -1)
        if first:
            everything[(real.cumsum(dim=1) == 1) & real] = 0

    def number(start: int, tokens: int) -> Tensor:
        if mask is not None:
            return everything[:, start : start + tokens]
        window = torch.ones(sequences, tokens, dtype=torch.int64)
        if first and start == 0:
            window[:, 0] = 0
        return window

    return number


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
