"""GRIFFIN: a model's pruned twin, which reads prompts in full and decodes on the kept neurons.

The method of Dong, Chen and Chi (2024, arXiv 2404.01365, section 4): the prompt runs through the
full model, whose FF neurons are scored by the hook that recording uses; the highest are copied
into compact projections; tokens are generated with those.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Literal, cast

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from transformers import PreTrainedModel

from flocking.analysis import densities_in_words, density_by_layer, kept_count, said_by
from flocking.feedforward import (
    FeedForward,
    by_interface,
    copy_with_blocks,
    feedforwards,
    inherit,
    is_observed,
    is_plain,
)
from flocking.models import (
    Original,
    hooks_on,
    is_loaded,
    refuse_forgetful,
    require_model,
    rewinds,
    traits,
    why_not_finite,
    working_copy,
)
from flocking.pruning.compact import Compact
from flocking.pruning.methods import (
    METHODS,
    WITH_REFERENCE,
    Method,
    by_reference,
    check_weight,
    global_local,
    over_runs,
)
from flocking.pruning.offloading import offloaded
from flocking.pruning.refreshing import RefreshingTwin
from flocking.pruning.selector import Scope, Selector
from flocking.pruning.state import State
from flocking.pruning.twin import Twin, twin_class
from flocking.recording import whole_neurons, whole_number

_WEIGHT = 0.5  # of the global ranks, unless another is given


def griffin(
    model: PreTrainedModel,
    density: float | Sequence[float] = 0.5,
    *,
    method: str | Method = "topk",
    scope: Scope = "shared",
    reference: xr.DataArray | None = None,
    weight: float = _WEIGHT,
    seed: int = 0,
    offload: Literal["cpu"] | None = None,
    refresh: int | None = None,
) -> Twin:
    """A twin of `model` whose ``generate`` decodes on the neurons that each prompt selects.

    The twin shares all parameters with `model` except the FF projections, which are compact
    copies of the kept neurons' rows and columns. Each call of ``generate`` runs its prompt
    through the full model, selects the neurons to keep (Dong, Chen and Chi 2024, arXiv
    2404.01365, section 4, who call them "expert neurons"), copies their weights and decodes with
    those; the first new token is the full model's. `model` is not changed.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A decoder-only model that can generate. Convert it (dtype, device) before, not after.
    density : float or sequence of float
        Fraction of neurons to keep, in (0, 1]: one number, or one for each FF block, in order, or
        by label from what names its layers, as :func:`flocking.select` takes it.
        (A block that runs several times in a forward pass counts once: all runs have the same
        selection.)
    method : str or callable
        How to select: "topk" (GRIFFIN), "sampled", "half-sampled", "random", "magnitude",
        "static" or "global-local" (the last two need `reference`). Or a function of one statistic
        (float64, shape (d_ff,)), the number to keep, the :class:`FeedForward` and a
        ``torch.Generator`` that returns scores of the same shape; the neurons with the largest
        are kept. (For a mixture of experts the shape is (expert, neuron), and the same number
        of neurons is kept in each expert.)
    scope : {"shared", "sequence"}
        In a batch, one selection for all sequences, from ``sum_b s_b / sqrt(n_b)`` with the
        ``n_b`` real tokens of each (ibid., section 4.3), or one for each sequence. The latter
        holds the compact weights once per sequence (and beam).
    reference : xarray.DataArray, (layer, neuron), optional
        The static statistic for "static" and "global-local": :func:`flocking.global_statistic`.
        (With the statistic of the text that follows the prompt, "static" is the oracle.)
    weight : float
        Weight of the global ranks in "global-local" (GLASS, arXiv 2508.14302).
    seed : int
        For the methods that draw at random: the same prompt gives the same selection every time,
        with ``scope="sequence"`` in any batch.
    offload : "cpu", optional
        For a model in host memory that need not fit the accelerator. The twin decodes on the
        accelerator, with copies of all weights except the full FF projections', which stay in
        host memory and are copied over, block by block, to read each prompt. Without an
        accelerator nothing moves.
    refresh : int, optional
        After how many new tokens to select anew, for long generations. At every such token the
        full model reads all those since the last time in one piece, in the place of the twin's
        step: their keys and values replace the twin's in the cache, they are added to the
        statistic, and the next token is the full model's. With 1, all tokens are. By default
        neurons are selected once, from the prompt, as in the paper. Refreshes happen in
        ``generate`` (but not while the twin is the draft of another model),
        :class:`flocking.Decoder`, :func:`flocking.score` and :func:`flocking.perplexity`. A batch
        must have ``scope="shared"`` for a beam search.

    Returns
    -------
    transformers.PreTrainedModel
        Of `model`'s class, with three more members: ``selection`` (indices of the kept neurons by
        layer), ``history`` (each selection since the text began, for
        :func:`flocking.captured_energy`) and ``report()``. Memory rises by the compact projections,
        and nothing of `model` is freed. (With `offload`, the accelerator's memory rises by those
        and by everything that is not an FF projection.) Hooks that `model` has now are the twin's
        too, when it reads prompts and when it decodes, until they are removed from `model`; one
        that is registered on the twin itself acts on decoding only. From the next prompt on, the
        twin follows changes of `model`: of values, of parameters and buffers that are replaced by
        others of the same shape, of whatever else its modules keep, such as which adapter is
        active, and of its configs, ``generation_config`` among them. It refuses a prompt after any
        other (modules, hooks, dtype, device). A twin serves one
        thread at a time, and computes in eval mode, without dropout, whatever the model's mode is.

        In a second turn on a cache that this twin filled, the statistic is that of the earlier
        turns and of the new turn's tokens; tokens that were generated, pruned, do not count.
        (With `refresh`, the full model reads them first, and they do.) On any other cache, on a
        copy, after a beam search with `refresh`, or on one that was cut to less than its prompt,
        the selection is made from the new tokens alone.

    Raises
    ------
    ValueError
        For a density outside of (0, 1] or that keeps no neuron, an unknown method or scope, a
        reference that is missing, that `method` does not use, or of other layers or widths,
        weights that are quantised or not in memory, hooks on FF projections, a model that does not
        generate or cannot go on from a cache, or a twin; with `offload`, for a model that is not in
        host memory; with `refresh` below 1, or for a model whose cache cannot be taken back.
    TypeError
        If `density` or `seed` is not a number, or `reference` is not a DataArray of numbers.
    RuntimeError
        Inside of a :func:`flocking.observe` of `model`. By the twin's ``generate``, if `model` was
        changed in a way that the twin does not follow.
    UnsupportedModelError
        If the model's FF blocks cannot be located and proved.

    Examples
    --------
    >>> pruned = flocking.griffin(model, density=0.5)
    >>> prompt = tokenizer("Birds of a feather", return_tensors="pt")
    >>> sequences = pruned.generate(**prompt, max_new_tokens=8)
    >>> {layer: len(kept) for layer, kept in pruned.selection.items()}
    {0: 32, 1: 32}
    >>> pruned.report()
    Report of a twin: what it holds, and what its last prompt cost
      parameters                ...
      active parameters         ... (...%)
      ...

    With selections that are made anew after every four tokens:

    >>> pruned = flocking.griffin(model, density=0.5, refresh=4)
    >>> sequences = pruned.generate(**prompt, max_new_tokens=9)
    >>> pruned.report().refreshes, pruned.report().effective_density
    (2, 0.625)
    >>> pruned.history.sizes["position"]
    3
    """
    model = require_model(model)
    _check_options(scope, seed, offload)
    check_refresh(refresh)
    _check_method(method, reference, weight)
    blocks = require_prunable(model)
    _refuse_inseparable(model, blocks, scope)
    firsts = [block for block in blocks if block.call == 0]
    shares = density_by_layer(density, len(firsts), [block.layer for block in firsts])
    counts = [
        kept_count(each, block.d_ff // block.experts)
        for each, block in zip(shares, firsts, strict=True)
    ]
    known = traits(model)
    if refresh is not None:
        _refuse_unrewindable(model)
    chosen_by = _method(method, reference, weight, blocks)
    given = model
    if offload:
        model = offloaded(model)
        blocks = feedforwards(model)
        firsts = [block for block in blocks if block.call == 0]
    selector = Selector(
        list(zip(firsts, counts, strict=True)),
        chosen_by,
        scope,
        int(seed),
    )
    with torch.inference_mode(False), torch.no_grad():  # it outlives the mode of the moment
        twin, full = working_copy(model), copy_with_blocks(model)
        origin = Original(given, twin, full, check=lambda: _check_changed(full))
        paths = {id(module): path for path, module in model.named_modules()}
        compacts = [Compact(twin, block, paths, k) for block, k in zip(firsts, counts, strict=True)]
        for compact in compacts:
            compact.layers = [b.layer for b in blocks if b.down is compact.block.down]
        origin.put_aside({paths[id(part.original)] for each in compacts for part in each.parts})
        inherit(model, twin)
    traits.remember(full, known)
    state = State(full, compacts, selector, refresh)
    state.origin = origin
    state.made_from = _in_words(method, reference, weight, shares)
    return _become_twin(twin, state, Twin if refresh is None else RefreshingTwin)


def _in_words(
    method: str | Method, reference: xr.DataArray | None, weight: float, shares: list[float]
) -> str:
    """How a twin selects neurons."""
    known = method if isinstance(method, str) else getattr(method, "__name__", "a function")
    text = f"flocking.griffin, method {known}"
    if known == "global-local":
        text += f" (weight {weight:g})"
    if known in WITH_REFERENCE and reference is not None:
        text += f" with {said_by(reference) or 'a static statistic'}"
    return f"{text}, {densities_in_words(shares)}"


def check_refresh(refresh: object) -> None:
    """Refuse what is no refresh of :func:`griffin`; needs no model."""
    whole_number("refresh", 1 if refresh is None else refresh, 1)


def check_scope(scope: object) -> None:
    """Refuse what is no scope of :func:`griffin`; needs no model."""
    if scope not in ("shared", "sequence"):
        raise ValueError(f"scope={scope!r}: give 'shared' or 'sequence'.")


def _refuse_unrewindable(model: PreTrainedModel) -> None:
    """Refuse to refresh selections over a cache that cannot be taken back."""
    if not rewinds(model):
        raise ValueError(
            f"{type(model).__name__} cannot read tokens again over its cache, as refresh needs: "
            "leave refresh out."
        )


def _refuse_inseparable(model: PreTrainedModel, blocks: list[FeedForward], scope: object) -> None:
    """Refuse a selection for each sequence where a block cannot have several."""
    if scope == "sequence" and (odd := [b for b in blocks if not _is_separable(b)]):
        raise ValueError(
            f"{type(model).__name__} has FF blocks ({odd[0].path}, ...) that are quantised, or "
            "experts that do not follow transformers' interface, and cannot have a selection for "
            "each sequence: give scope='shared'."
        )


def _check_options(scope: object, seed: object, offload: object) -> None:
    check_scope(scope)
    if not isinstance(seed, int | np.integer):
        raise TypeError(f"seed={seed!r}: give a whole number.")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed={seed!r}: give a number below 2 ** 63.")
    if offload not in (None, "cpu"):
        raise ValueError(f"offload={offload!r}: give 'cpu', or leave it out.")


def _become_twin(copied: PreTrainedModel, state: State, base: type[Twin]) -> Twin:
    """Give it a twin's class, also where accelerate keeps the forward of the class before."""
    plain = type(copied)
    added = {name for part in base.__mro__ if issubclass(part, Twin) for name in vars(part)}
    for name in added & vars(copied).keys():
        raise ValueError(
            f"model.{name} was replaced on this very object, and a twin would go around its own: "
            f"delete it (del model.{name})."
        )
    copied.__class__ = twin_class(plain, base)  # type: ignore[arg-type] # a class can be hashed
    for name in ("_old_forward", "forward"):
        if getattr(vars(copied).get(name), "__func__", None) is plain.forward:
            copied.__dict__[name] = copied.__class__.forward.__get__(copied)
    twin = cast(Twin, copied)
    if getattr(twin.generation_config, "use_cache", True) is False:
        # So MPT's configs have it, and others that were trained: a twin needs the prompt's cache.
        twin.generation_config.use_cache = True
    twin._griffin = state
    state.hooks = {id(hook) for module in twin.modules() for hook in hooks_on(module)}
    state.modules = {path: weakref.ref(module) for path, module in twin.named_modules()}
    return twin


def _check_changed(full: PreTrainedModel) -> None:
    """Refuse a full model that :func:`griffin` would not take as it has become."""
    prunable(full)
    refuse_forgetful(full)


def require_prunable(model: PreTrainedModel) -> list[FeedForward]:
    """The blocks of a model that a twin can be made of now; an error says why it cannot.

    Makes no twin, and takes no memory: it is for what would find out only after a long time.

    Raises
    ------
    RuntimeError, ValueError, UnsupportedModelError
        As :func:`griffin`, but for what is wrong with other arguments, and for members that were
        replaced on the model itself, which only a twin shows.
    """
    if is_observed(model):
        raise RuntimeError(
            "the model is observed, and a twin would be so for good: leave the `with` of "
            "flocking.observe first."
        )
    blocks = prunable(model)
    refuse_forgetful(model)
    return blocks


def prunable(model: PreTrainedModel) -> list[FeedForward]:
    """The blocks of a model whose neurons can be removed; a ValueError says why they cannot."""
    name = type(model).__name__
    if isinstance(model, Twin):
        raise ValueError("model is a twin already: give griffin the original.")
    if not all(map(is_loaded, model.modules())):
        raise ValueError(f"{name} has weights on the meta device, without values: load them first.")
    blocks = feedforwards(model)
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise ValueError(
            f"{name} is not a decoder-only model that generates: load it with AutoModelForCausalLM."
        )
    if fixed := [b for b in blocks if not b.prunable or b.offset is not None]:
        raise ValueError(
            why_not_finite(model)
            or f"{name} cannot be pruned, only recorded: in {len(fixed)} FF blocks "
            f"({fixed[0].path}, ...) {_why_fixed(fixed[0])}."
        )
    holders: dict[int, set[tuple[int, str]]] = {}
    for module in model.modules():
        for child, inner in module.named_children():
            holders.setdefault(id(inner), set()).add((id(module), child))
    for block in blocks:
        parts = [part for part in (block.up, block.gate, block.down) if part is not None]
        if any(len(holders[id(part)]) > 1 for part in parts):
            raise ValueError(f"{name} cannot be pruned: {block.path} shares a single projection.")
        if any(map(hooks_on, [*parts, *_between(model, parts)])):
            raise ValueError(
                f"{name} has a hook inside of {block.path}, on a projection or an activation "
                "function, which would be given the kept neurons only: remove it, or register it "
                "on the block itself."
            )
    return blocks


def _between(model: PreTrainedModel, parts: list[nn.Module]) -> list[nn.Module]:
    """Modules without weights beside a block's projections, or inside of its experts.

    Activation functions are such modules, and are given the block's neurons.
    """
    found: list[nn.Module] = []
    for parent in model.modules():
        children = list(parent.children())
        if parent in parts or any(part is child for part in parts for child in children):
            beside = (child for child in children if next(child.parameters(), None) is None)
            found += [inner for child in beside for inner in child.modules()]
    return found


def _why_fixed(block: FeedForward) -> str:
    """Why neurons cannot be removed from a block."""
    if block.offset is not None:
        return "they are given more than the text's tokens"
    odd = [p for p in (block.gate, block.up, block.down) if p is not None and not is_plain(p)]
    if not odd:
        return "neurons depend on each other, for example by a norm before the down-projection"
    if is_parametrized(odd[0]):
        return (
            "a weight is computed by a parametrization: make it permanent with "
            "torch.nn.utils.parametrize.remove_parametrizations(module, 'weight')"
        )
    if "weight" not in odd[0]._parameters and hooks_on(odd[0]):
        return (
            "a weight is computed by a hook, as by torch.nn.utils.prune: make it permanent, there "
            "with torch.nn.utils.prune.remove(module, 'weight')"
        )
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
    """Whether its projections can compute each sequence with other weights."""
    if block.kind == "experts":
        return by_interface(block.down)
    parts = (block.up, block.gate or block.up, block.down)
    return all(map(is_plain, parts)) and not block.token_first


def _method(
    method: str | Method, reference: xr.DataArray | None, weight: float, blocks: list[FeedForward]
) -> Method:
    """The method of these arguments, which were checked."""
    if callable(method):
        return method
    if method in METHODS:
        return METHODS[method]
    assert reference is not None
    return _with_reference(method, reference, weight, blocks)


def _check_method(method: str | Method, reference: xr.DataArray | None, weight: float) -> None:
    """Refuse what needs no model to be refused."""
    if reference is not None and method not in WITH_REFERENCE:
        asked = "a function" if callable(method) else repr(method)
        raise ValueError(
            f"reference is for method='static' and 'global-local', and method is {asked}: name one "
            "of them, or leave reference out."
        )
    if weight != _WEIGHT and method != "global-local":
        raise ValueError(
            f"weight={weight!r} is for method='global-local': name it, or leave weight out."
        )
    if callable(method) or method in METHODS:
        return
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
    check_weight(weight)


def _with_reference(
    method: str, reference: xr.DataArray, weight: float, blocks: list[FeedForward]
) -> Method:
    """A method that needs a static statistic, of the model that it was made from."""
    if not {"layer", "neuron"} == set(reference.dims):
        raise ValueError(f"expected reference (layer, neuron), got dimensions {reference.dims}.")
    layers, widest = [block.layer for block in blocks], max(block.d_ff for block in blocks)
    try:
        reference = whole_neurons(reference)  # in the order of their labels
    except ValueError as problem:
        raise ValueError(f"reference: {problem}") from problem
    found = reference.layer.values.tolist()
    same = len(found) == len(layers) and set(found) == set(layers)
    if not same or reference.sizes["neuron"] != widest:
        raise ValueError(
            f"expected reference of {len(layers)} layers, {layers[0]} to {layers[-1]}, of {widest} "
            f"neurons, got one of {len(found)} layers, {found[0]} to {found[-1]}, of "
            f"{reference.sizes['neuron']} neurons: make it from this model."
        )
    if reference.dtype.kind not in "fiu":
        raise TypeError(f"reference is of {reference.dtype}: give numbers, a statistic.")
    reference = reference.sel(layer=layers)
    values = reference.transpose("layer", "neuron").values.astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("reference has values that are not finite: make it from this model.")
    several = len({id(block.down) for block in blocks}) < len(blocks)
    if several and (values < 0).any():
        raise ValueError(
            "reference has negative values, and those of the runs of one block are added as norms "
            "are: give a statistic, which has none."
        )

    by_layer = dict(zip(layers, over_runs(values, blocks), strict=True))

    def of(block: FeedForward) -> Tensor:
        return torch.from_numpy(by_layer[block.layer][: block.d_ff])

    return by_reference(of) if method == "static" else global_local(of, weight)
