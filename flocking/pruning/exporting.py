"""A fixed selection as an ordinary model: a folder that transformers reads without this package."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from flocking.analysis import kept_count
from flocking.artifacts import replacing
from flocking.feedforward import FeedForward, cut, fused_rows, stored_transposed
from flocking.feedforward import moe as mixtures
from flocking.models import (
    Text,
    attention,
    byte_count,
    context,
    device_of,
    embeddings_of,
    folder_of,
    loaded,
    put,
    read_model,
    relative_error,
    require_model,
    require_tokenizer,
    tokenize,
    tokenizer_beside,
    tolerance,
    undisturbed,
    vocabulary_of,
    warn,
    working_copy,
)
from flocking.pruning import lost as losses
from flocking.pruning.build import griffin, prunable
from flocking.pruning.cards import card_of
from flocking.pruning.chosen import layers_of, made_from, masks_of
from flocking.pruning.classes import misread
from flocking.pruning.exported import Exported
from flocking.pruning.fixed import rounded_densities
from flocking.pruning.places import (
    place_of_folder,
    refuse_existing,
    refuse_likely_source,
    refuse_without_room,
)
from flocking.pruning.saveable import refuse_unsaveable
from flocking.pruning.sources import copy_companions, source_of
from flocking.pruning.twin import full_model, read_prompt
from flocking.pruning.widths import Sized, bytes_after, narrowed, sized
from flocking.recording import require_bool

_SHARD = "5GB"  # at most, of one file of weights
_TOKENS = 24  # of the text that the files are tried on
_EXACT = 1e-5  # largest relative error in float32, where sums are only added up in another order


def export(
    model: PreTrainedModel,
    selection: dict[int, Tensor] | xr.DataArray,
    folder: str | os.PathLike[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    held_out: Text | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write a smaller model, which keeps the selected neurons only, into a folder.

    The folder is what ``save_pretrained`` writes of a model of the same class whose FF blocks are
    narrower: weights in safetensors, config, generation config, tokenizer with its chat template,
    and a model card (``README.md``); and, where the model is from a folder, what other programs
    read there: its SentencePiece vocabulary, the configs of its processors, its licence.
    transformers loads it as any other model; nothing in it needs
    this package. `model` is not changed.

    Where an architecture has one width for several layers, those that keep fewer neurons than
    others are filled up with neurons of zero weights; experts are filled up to a multiple of 8.
    What such a neuron adds to its block's output is zero, whatever its activation is. Before the
    folder is put into its place, it is read again, and must have the weights that were written
    and the logits of a twin with this selection.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The full model, of which :func:`flocking.griffin` can make twins.
    selection : dict of Tensor, or xarray.DataArray
        The neurons to keep: a twin's ``selection``, which is indices by layer, int64 (k,) or
        (1, k); or what :func:`flocking.select` returns, bool (layer, neuron), with a dimension
        ``sequence`` of size 1 or without. The model card says how it was made if
        ``selection.attrs["made_from"]`` does, which ``select`` fills in and anybody may set.
    folder : str or path
        Where to. Folders above it are made if they are not there.
    tokenizer : transformers.PreTrainedTokenizerBase, optional
        Is saved with the model; by default the one in the model's folder or repository.
    held_out : str, list of str or list of list of int, optional
        Texts that the selection was not made from. What the smaller model loses on them is
        measured, and the model card says it.
    overwrite : bool
        Replace a folder that is there, if all of it is what transformers or this function writes
        of a model, and it is not where `model` is from. Where `model` has a relative name, so that
        its folder is not known, no folder of a model as wide is replaced.

    Returns
    -------
    Exported
        Sizes before and after, widths, and what is lost.

    Raises
    ------
    TypeError
        If `model` is no transformers model, `selection` no selection, or `overwrite` no bool.
    ValueError
        If `selection` is of several sequences or does not fit the model; if the folder is there
        already; if the config of the architecture cannot say another width of its FF blocks; if
        the model computes what no file would say (hooks, adapters, masks, quantised weights), or
        cannot be pruned; or if what was written is not the pruned model.
    UnsupportedModelError
        If the model's FF blocks cannot be located and proved.
    OSError
        If the folder cannot be written, or there is no room for it.
    RuntimeError
        Inside of a :func:`flocking.observe` of `model`.

    Warns
    -----
    UserWarning
        If only the model's own class reads the folder right, as a subclass with another
        ``forward``: ``AutoModelForCausalLM`` goes by the config alone.

    Examples
    --------
    >>> statistic = flocking.global_statistic(
    ...     model, flocking.passages()[:2], tokenizer=tokenizer, progress=False
    ... )
    >>> kept = flocking.select(statistic, density=0.5)
    >>> flocking.export(model, kept, "half", tokenizer=tokenizer)
    Exported
      written to: half
      parameters: ...
      size: ...
      neurons kept: 32 in each of 2 layers
    >>> smaller, tokenizer = flocking.load("half")
    >>> smaller.config.intermediate_size
    32

    With the neurons that a twin selected from a prompt:

    >>> pruned = flocking.griffin(model, density=0.25)
    >>> prompt = tokenizer("Birds of a feather", return_tensors="pt")
    >>> sequences = pruned.generate(**prompt, max_new_tokens=8)
    >>> done = flocking.export(model, pruned.selection, "quarter", tokenizer=tokenizer)
    >>> done.stored
    {0: 16, 1: 16}
    """
    place, overwrite = place_of_folder(folder), require_bool("overwrite", overwrite)
    model = require_model(model)

    def check(path: Path) -> None:
        source = folder_of(model) or getattr(model, "name_or_path", None)
        refuse_existing(path, place, overwrite, source)

    if os.path.lexists(place):
        check(place)
    refuse_unsaveable(model)
    blocks = prunable(model)
    masks = masks_of(selection, layers_of(blocks))
    tokenizer = _tokenizer(model, tokenizer)
    if held_out is not None:
        _check_texts(model, held_out, tokenizer)
    parts = sized(model, [block for block in blocks if block.call == 0])
    config, widths = narrowed(model, parts, [_width(part, masks) for part in parts])
    if os.path.lexists(place):
        refuse_likely_source(place, place, model, config)
    ids = _ids(model)
    with replacing(place, overwrite=overwrite, check=check) as partial:
        expected = _logits_of_twin(model, masks, ids)
        smaller = _smaller(model, parts, masks, widths, config)
        done = _sizes(place, model, smaller, parts, masks, widths)
        refuse_without_room(place, partial.parent, done.bytes)
        state = _state(smaller)
        _save(smaller, state, partial)
        again = _read_again(type(model), partial, smaller, state)
        del smaller, state  # a GPU may have no room for this one beside the other two
        _prove(model, again, ids, expected)
        done = dataclasses.replace(done, only=_only(model, partial, place, ids, expected))
        if held_out is not None:
            measure: Callable[..., Any] = losses.measure_lost
            lost = measure(model, again, held_out, tokenizer=tokenizer)
            done = dataclasses.replace(done, lost=lost)
        source = source_of(model, _state(model))
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        copy_companions(source, partial, tokenizer)
        told = made_from(selection, masks)
        card = card_of(model, source, config, done, parts, told, tokenizer is not None)
        (partial / "README.md").write_text(card, encoding="utf-8")
    return done


def refuse_unexportable(
    model: PreTrainedModel, density: float, multiple: int, place: Path, folder: Path
) -> None:
    """Raise what :func:`export` would, before a selection is made for it.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    density : float
        Fraction of neurons that will be kept in each layer.
    multiple : int
        Of what widths will be multiples.
    place, folder : Path
        Where the model is to be written, and a folder on the disk where it is written first.

    Raises
    ------
    OSError, RuntimeError, UnsupportedModelError, ValueError
        As :func:`export`.
    """
    refuse_unsaveable(model)
    parts = sized(model, [block for block in prunable(model) if block.call == 0])
    blocks = [part.block for part in parts]
    densities = rounded_densities(blocks, density, multiple)
    pairs = zip(densities, blocks, strict=True)
    counts = [kept_count(one, block.d_ff // block.experts) for one, block in pairs]
    _, widths = narrowed(model, parts, counts)
    refuse_without_room(place, folder, bytes_after(model, parts, widths))


def _tokenizer(
    model: PreTrainedModel, given: PreTrainedTokenizerBase | None
) -> PreTrainedTokenizerBase | None:
    """The tokenizer to save: that of the model, or another one whose tokens the model has."""
    own, given = tokenizer_beside(model), require_tokenizer(given)
    if given is None:
        return own
    tokens, rows = len(given), vocabulary_of(model)
    # (Some models are published with a tokenizer that has more, for images, say.)
    if tokens > rows and (own is None or own.get_vocab() != given.get_vocab()):
        raise ValueError(
            f"tokenizer has {tokens:,} tokens, and the model's embedding {rows:,}: give the "
            "model's own, or resize the embedding first (model.resize_token_embeddings)."
        )
    return given


def _check_texts(
    model: PreTrainedModel, texts: Text, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """Refuse texts that nothing can be measured on, before anything is written."""
    if not any(len(ids) > 1 for ids in tokenize(model, texts, tokenizer).ids):
        raise ValueError("held_out: no text has two tokens: give longer ones.")


# --------------------------------------------------------------------------------------
# The smaller model


def _width(part: Sized, masks: dict[int, np.ndarray]) -> int:
    """How many neurons of a block are kept; in a mixture, of each expert."""
    return int(masks[part.block.layer].sum()) // part.block.experts


@torch.inference_mode(False)
@torch.no_grad()
def _smaller(
    model: PreTrainedModel,
    parts: Sequence[Sized],
    masks: dict[int, np.ndarray],
    widths: Sequence[int],
    config: PreTrainedConfig,
) -> PreTrainedModel:
    """A working copy with the kept neurons, filled up to the widths; its other weights are shared.

    It is for its weights, not for running it.
    """
    copied = working_copy(model)
    copied.config = config
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)
    for part, width in zip(parts, widths, strict=True):
        mask = masks[part.block.layer].reshape(part.block.experts, -1)
        kept = torch.from_numpy(np.stack([row.nonzero()[0] for row in mask]))
        for original in dict.fromkeys((part.block.up, part.block.gate, part.block.down)):
            if original is None:
                continue
            compact = _cut(part.block, original, kept.to(part.block.device), width)
            for path in paths[original]:
                put(copied, path, compact)
    return copied


def _cut(block: FeedForward, original: nn.Module, kept: Tensor, width: int) -> nn.Module:
    """A projection, or a mixture's experts, of the kept neurons, int64 (expert, k), and zeros."""
    count = kept.shape[1]
    if block.kind == "experts":
        return mixtures.take(original, kept, zeros=width - count)
    neurons = torch.cat((kept[0], kept[0, :1].expand(width - count)))
    added = torch.arange(count, width, device=neurons.device)
    across = stored_transposed(original)
    if original is block.down:
        compact, axis = cut(original, inputs=neurons), 0 if across else 1
    else:
        if block.kind == "fused":
            neurons = fused_rows(neurons, block.d_ff, block.interleaved)
            added = fused_rows(added, width, block.interleaved)
        compact, axis = cut(original, outputs=neurons), 1 if across else 0
        if (bias := compact._parameters.get("bias")) is not None:
            bias.data.index_fill_(0, added.to(bias.device), 0)
    weight = compact._parameters["weight"]
    assert weight is not None
    weight.data.index_fill_(axis, added.to(weight.device), 0)
    return compact


def _sizes(
    place: Path,
    model: PreTrainedModel,
    smaller: PreTrainedModel,
    parts: Sequence[Sized],
    masks: dict[int, np.ndarray],
    widths: Sequence[int],
) -> Exported:
    pairs = zip(parts, widths, strict=True)
    stored = {part.block.layer: width * part.block.experts for part, width in pairs}
    kept = {layer: int(masks[layer].sum()) for layer in stored}
    before, after = list(model.parameters()), list(smaller.parameters())
    return Exported(
        path=place,
        parameters=sum(p.numel() for p in after),
        parameters_before=sum(p.numel() for p in before),
        bytes=sum(map(byte_count, after)),
        bytes_before=sum(map(byte_count, before)),
        kept=kept,
        stored=stored,
    )


# --------------------------------------------------------------------------------------
# Writing and reading again


def _state(smaller: PreTrainedModel) -> dict[str, Tensor]:
    """All weights by name, those that are offloaded included; tied ones are one tensor."""
    state = dict(smaller.state_dict())
    if not any(value.is_meta for value in state.values()):
        return state
    for path, module in smaller.named_modules(remove_duplicate=False):
        for name in (*module._parameters, *module._buffers):
            whole = f"{path}.{name}".lstrip(".")
            if whole in state and state[whole].is_meta:
                with loaded(module):
                    state[whole] = getattr(module, name).detach().to("cpu", copy=True)
    for name, source in getattr(smaller, "all_tied_weights_keys", {}).items():
        if name in state and source in state:
            state[name] = state[source]
    return state


def _save(smaller: PreTrainedModel, state: dict[str, Tensor], partial: Path) -> None:
    smaller.__dict__.pop("hf_device_map", None)  # nothing is offloaded in `state`
    smaller.save_pretrained(partial, state_dict=dict(state), max_shard_size=_SHARD)


def _read_again(
    kind: type[PreTrainedModel], partial: Path, smaller: PreTrainedModel, state: dict[str, Tensor]
) -> PreTrainedModel:
    """What transformers makes of the files: the weights that were written, no more and no fewer."""
    try:
        with torch.device("cpu"):  # whatever is the default
            again = read_model(kind, str(partial), exact=True, dtype=smaller.dtype).eval()
    except ValueError as problem:
        why = str(problem).removeprefix(f"{partial}: ").replace(str(partial), "the folder")
        raise ValueError(
            f"{kind.__name__} cannot be exported: transformers does not read what it has written "
            f"({why.rstrip('.')})."
        ) from problem
    found = again.state_dict()
    for name in sorted({*found, *state}):
        if name not in found or name not in state:
            raise ValueError(
                f"{kind.__name__} cannot be exported: read again, it has other weights than were "
                f"written ({name})."
            )
        mine, theirs = state[name], found[name]
        if mine.dtype != theirs.dtype:
            raise ValueError(
                f"{kind.__name__} cannot be exported: {name} is in {_short(mine)}, and is read "
                f"again in {_short(theirs)}: convert the whole model first (model.to(dtype))."
            )
        if not torch.equal(mine.cpu(), theirs.cpu()):
            raise ValueError(
                f"{kind.__name__} cannot be exported: read again, {name} has other values than "
                "were written."
            )
    return again


def _short(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


# --------------------------------------------------------------------------------------
# The proof


def _ids(model: PreTrainedModel) -> Tensor:
    """Random token ids, int64 (1, token)."""
    generator = torch.Generator().manual_seed(0)
    count = min(_TOKENS, context(model) or _TOKENS)
    return torch.randint(vocabulary_of(model), (1, count), generator=generator, device="cpu")


def _logits_of_twin(model: PreTrainedModel, masks: dict[int, np.ndarray], ids: Tensor) -> Tensor:
    """Logits of a twin with this selection, which computes all tokens pruned, on the CPU."""

    def keep(statistic: Tensor, k: int, block: FeedForward, generator: object) -> Tensor:
        mask = torch.from_numpy(masks[block.layer])
        return mask.to(statistic).reshape(statistic.shape)

    firsts = [block for block in prunable(model) if block.call == 0]
    twin = griffin(model, [float(masks[block.layer].mean()) for block in firsts], method=keep)
    with undisturbed(twin, seed=0):
        read_prompt(twin, lambda: _run(full_model(twin), ids), len(ids), tokens=ids.shape[1])
    return _logits(twin, ids)


def _run(model: PreTrainedModel, ids: Tensor) -> Any:
    ids = ids.to(device_of(embeddings_of(model)))
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with undisturbed(model, seed=0):
        return _run(model, ids).logits.cpu()


def _prove(model: PreTrainedModel, again: PreTrainedModel, ids: Tensor, expected: Tensor) -> None:
    """Refuse files whose model has other logits than the twin.

    In half precision, rounding may send a token to another expert: a quarter of the tokens may
    differ by more than rounding does to the others.
    """
    name, whole = type(model).__name__, expected.dtype in (torch.float32, torch.float64)
    places = {parameter.device for parameter in model.parameters()}
    is_together = len(places) == 1 and not any(place.type == "meta" for place in places)
    if is_together:
        is_together = _moved(again, next(iter(places)))
    with attention(again, model.config._attn_implementation):
        got = _logits(again, ids)
    most = _EXACT if whole and is_together else tolerance(expected.dtype)
    errors = [relative_error(a, b) for a, b in zip(got[0], expected[0], strict=True)]
    error = max(errors) if whole else float(np.quantile(errors, 0.75))
    if not error <= most:
        raise ValueError(
            f"{name} cannot be exported: read again, its logits differ from those of a twin with "
            f"this selection by {error:.2g} of the largest (at most {most:.2g} is rounding). "
            "Something that the model computes is in none of its files, such as a module, function "
            "or buffer that was replaced."
        )


def _moved(model: PreTrainedModel, device: torch.device) -> bool:
    """Whether a model could be moved to a device; without room for it there it is on the CPU."""
    try:
        model.to(device)  # type: ignore[arg-type] # wrapped
    except torch.OutOfMemoryError:
        model.to("cpu")  # type: ignore[arg-type] # wrapped
        return False
    return True


def _only(model: PreTrainedModel, partial: Path, place: Path, ids: Tensor, expected: Tensor) -> str:
    """The model's class if no other one reads the folder right, with a warning; else empty."""
    other = misread(model, partial, lambda found: _prove(model, found, ids, expected))
    if not other:
        return ""
    name = type(model).__name__
    warn(
        f"{place} is to be read by {name} alone: AutoModelForCausalLM and flocking.load make a "
        f"{other} of it, which computes something else: load it with {name}.from_pretrained."
    )
    return name
