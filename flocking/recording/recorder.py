"""``record``: from a model and texts to a labelled Dataset of windowed moments."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import psutil
import torch
import xarray as xr
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flocking.feedforward import FeedForward, feedforwards, observe, select_layers
from flocking.models import (
    Chats,
    Prompts,
    Text,
    batches,
    chunks,
    forward,
    hooks_on,
    hooks_on_everything,
    is_loaded,
    refuse_long,
    require_model,
    traits,
    undisturbed,
    warn,
    with_inputs,
)
from flocking.recording.collector import Collector
from flocking.recording.continuations import (
    Reading,
    Wanted,
    generated,
    given_texts,
    refuse_continuing,
)
from flocking.recording.dataset import attributes_of, label, size_in_bytes
from flocking.recording.windows import Layout, window_counts

_SHARE_OF_MEMORY = 0.8  # of free memory, that a recording may take


def record(
    model: nn.Module,
    text: Text | Chats,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    window: int | None = 64,
    layers: Iterable[int] | None = None,
    prompt_tokens: int | Sequence[int] | None = None,
    continuation: Text | None = None,
    max_new_tokens: int = 0,
    max_tokens: int | None = None,
    relative: bool | Iterable[int] = False,
    ranks: bool = False,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
    **generation: Any,
) -> xr.Dataset:
    """Record how a model's feed-forward neurons behave along one or more texts.

    Every text is read once, without the language-model head. What is kept are the moments of the
    relative activations ``r_t = |z_t| / ||z_t||_2``, by sequence, layer, window of tokens and
    neuron; ``z_t`` is the input of the FF down-projection at token t (Dong, Chen and Chi 2024,
    arXiv 2404.01365, section 3).

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Any model with FF blocks that :func:`flocking.feedforwards` can prove. Its weights, hooks
        and training flags are not changed. An encoder-decoder gets the text twice: its encoder
        reads it, and its decoder takes it as what it has written so far. Layers are counted
        through both stacks; coordinate ``module`` says which is which.
    text : str, list of str, token ids, a tokenizer's output, or chats
        Strings are tokenized with the special tokens that the tokenizer adds by default
        (attribute ``special_tokens`` says which) and no chat template. Token ids are one
        sequence, a list of sequences, or a tensor of shape (sequence, token) without padding.
        In a tokenizer's output, padding on either side is dropped by its ``attention_mask``.
        What the model takes for every token, such as ``token_type_ids`` or ``position_ids``, of
        shape (sequence, token), is fed along; what the tokenizer returns about its work
        (``offset_mapping``, ``special_tokens_mask`` and the like) is left out, and so are
        ``token_type_ids`` of nothing but 0 where the model has no types. Anything else is
        refused by name.

        A chat is a list of messages, dicts with ``role`` and ``content``, and chats are a list of
        such lists. The tokenizer's own chat template writes them, and no other special tokens are
        added. If the last message has the role ``"assistant"``, it is the generation, up to the end
        of its turn as the template writes it, and all before it is the prompt, with the words that
        open the assistant's turn. Otherwise all is the prompt, with these words at its end, so that
        `max_new_tokens` or `continuation` answers it. For each answer of a long chat with what came
        before it as prompt, give the chat up to that answer, for each.

        A string with its special tokens already in it, as from a template, would get them
        twice: give ``tokenizer(text, add_special_tokens=False)`` instead of it.
    tokenizer : transformers.PreTrainedTokenizerBase, optional
        By default, the one in the model's folder (``model.name_or_path``).
    window : int or None
        Tokens in a window. None: the first token's window, and one for each phase.
    layers : iterable of int, optional
        Layers to record; all by default.
    prompt_tokens : int or sequence of int, optional
        How many tokens of `text` are the prompt, special tokens among them: the first ones, of all
        texts, or of each. The others are its continuation, phase ``"generation"``, as with
        `max_new_tokens`; for the same tokens, with the same values. All tokens given are read. The
        last one that a model generated was never fed to it: leave it out to have what
        `max_new_tokens` records.
    continuation : str, list of str, token ids, or a tokenizer's output, optional
        What follows each text, as its phase ``"generation"``: an answer that was logged, a
        reference. One for each text. Strings are tokenized by themselves and without special
        tokens, as in :func:`flocking.score`. All of it is read.
    max_new_tokens : int
        If positive, each text is continued, greedily unless `generation` says how, and the
        continuation is recorded as phase ``"generation"``: the whole text is read again in one
        pass. Since activations are causal, they are those of the generation up to rounding, except
        where a rotary embedding depends on the length of the text, as longrope does. Penalties,
        temperature and the like in the model's generation config are ignored. The last token that
        was generated was never fed to the model: it has no activations and is not in the recording.
    max_tokens : int or None
        Read at most this many tokens of each text: the first ones, special tokens among them, and
        a continuation that was given. All of them must fit the model's context, and with
        `max_new_tokens`, those and the new ones. Coordinate ``text`` has the whole text
        nevertheless, if it was given as a string.
    relative : bool or iterable of int
        Keep ``r`` itself as float16, for all layers or those listed. This takes much memory:
        with `progress`, its size is printed first.
    ranks : bool
        Also keep the sums of standardised ranks that rank consistency needs (slower).
    batch_size : int
        Sequences in a forward pass. It changes the speed, and results by rounding only. (With hooks
        of yours on the model, 1: they may look at all that is in a batch.)
    seed : int
        For models with a random forward pass, and for sampling. Global random number generators
        are not touched.
    progress : bool
        Show progress on standard error.
    **generation
        With `max_new_tokens`: arguments of the model's own ``generate``, such as
        ``do_sample=True, temperature=0.7`` or ``num_beams=4``, with transformers' defaults for the
        rest (``top_k=50`` among them). What is recorded is the continuation that they give. A text
        is sampled with its own random numbers, whatever texts are beside it; one that is given
        several times is sampled anew each time.

    Returns
    -------
    xarray.Dataset
        Save it with :func:`flocking.save_recording`. Dimensions: ``sequence``, ``layer``,
        ``window``, ``neuron``, ``token``. Variables:

        ``energy``, ``mass`` (sequence, layer, window, neuron), float32
            Sums over the window's tokens of ``r ** 2`` and of ``r``; unitless. Layers
            narrower than the widest are padded with zeros (coordinate ``d_ff`` by layer).
        ``norm``, ``l1`` (sequence, layer, token), float32
            ``||z_t||_2``, in the activations' units, and ``||r_t||_1``; NaN at padding.
        ``tokens`` (sequence, window), int64
            Real tokens in the window, 0 where a sequence has none.
        ``rank`` (sequence, layer, window, neuron), float32, with `ranks`
            Sums of each token's standardised ranks.
        ``routed`` (sequence, layer, window, routed_expert), float32, of mixtures of experts
            How many of the window's tokens were routed to each expert. The neurons of all
            experts lie side by side: coordinate ``expert`` (layer, neuron) is each neuron's
            expert (-1 in dense layers), ``experts`` (layer) their number (1 in dense layers).
        ``relative`` (sequence, layer, token, neuron), float16, with `relative`
            ``r`` itself, NaN at padding. If it is kept for some of the recorded layers only,
            its dimension is called ``relative_layer`` instead of ``layer``.

        Window 0 is the first token alone; then come the prompt's windows, then the
        generation's, with coordinates ``phase`` and ``start`` (counted from the
        sequence's first token, in phase ``"generation"`` from the first new one).
        ``token_id``, ``token_text`` and ``token_window`` have dimensions (sequence, token), with
        -1 or an empty string at padding; ``text`` (sequence) is each text as it was given,
        ``prompt_tokens`` (sequence) the number of its tokens before any generation, ``module``
        (layer) the path of each FF block. Attributes name the schema's version, which every
        measure checks (recordings from before it was there are read as version 1), the model, its
        revision and dtype, the versions and the arguments; ``generation`` is ``"none"``,
        ``"greedy"``, the arguments of ``generate``, or ``"as given"``.

    Raises
    ------
    UnsupportedModelError
        If the model's FF blocks cannot be located and proved.
    ValueError
        For an empty text, an input that cannot be fed, an unknown layer, a window below 1, a text
        longer than the model's context, weights on the meta device, or activations that are not
        finite; for a prompt that leaves nothing for its continuation, continuations that do not
        match the texts or come from two sources, a chat that the template does not take, and
        arguments that ``generate`` cannot use here.
    TypeError
        If `model` is not a transformers model, `tokenizer` is no tokenizer, or `text` or a list
        of layers has another form; for an argument that neither this nor ``generate`` knows.
    MemoryError
        If the arrays of the result would not fit in memory. This is checked first.

    Examples
    --------
    >>> recording = flocking.record(model, "The starlings turned as one.", progress=False)
    >>> dict(recording.sizes)
    {'sequence': 1, 'layer': 2, 'window': 2, 'neuron': 64, 'token': 7}
    >>> recording.phase.values.tolist(), recording.tokens.values.tolist()
    (['first', 'prompt'], [[1, 6]])

    Several texts, with more of what can be recorded:

    >>> texts = ["Birds of a feather", "The starlings turned as one."]
    >>> recording = flocking.record(model, texts, max_new_tokens=8, ranks=True, progress=False)
    >>> recording.phase.values.tolist()
    ['first', 'prompt', 'generation']
    >>> recording["rank"].dims
    ('sequence', 'layer', 'window', 'neuron')

    An answer that was logged, and a chat:

    >>> recording = flocking.record(
    ...     model, "Birds of a feather", continuation=" flock together.", progress=False
    ... )
    >>> recording.prompt_tokens.item(), recording.sizes["token"]
    (4, 7)
    >>> chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    >>> recording = flocking.record(model, chat, progress=False)
    >>> recording.phase.values.tolist()
    ['first', 'prompt', 'generation']
    >>> flocking.prompt_generation_overlap(recording).dims
    ('sequence', 'layer')

    Of long texts, the beginning:

    >>> recording = flocking.record(model, flocking.passages(), max_tokens=16, progress=False)
    >>> dict(recording.sizes)
    {'sequence': 12, 'layer': 2, 'window': 2, 'neuron': 64, 'token': 16}
    """
    check_numbers(window, max_new_tokens, max_tokens, batch_size, seed)
    wanted = Wanted(prompt_tokens, continuation, max_new_tokens, generation)
    wanted.check()
    model = _checked(require_model(model))
    given = given_texts(model, text, tokenizer, wanted, max_tokens)
    refuse_long(model, given.whole.ids, max_new_tokens, "max_tokens")
    refuse_continuing(model, given, max_new_tokens)
    blocks = select_layers(feedforwards(model), layers)
    raw = (
        select_layers(blocks, None if relative is True else relative, "relative")
        if relative
        else []
    )
    _check_memory(given, blocks, raw, window, max_new_tokens, ranks)
    _warn_of_training(model)
    with undisturbed(model, seed):
        fed = generated(model, given.whole, wanted, seed, progress)
        layout = Layout.of(given.prompts, [len(ids) for ids in fed.ids], window)
        collector = Collector(blocks, raw, layout, ranks)
        _read(model, collector, fed, batch_size, progress)
    attributes = attributes_of(
        model,
        blocks[0],
        special_tokens=fed.special,
        window=window,
        max_new_tokens=max_new_tokens,
        max_tokens=max_tokens,
        seed=seed,
        generation=wanted.source(given),
    )
    return label(collector, fed.ids, fed.texts, fed.tokenizer).assign_attrs(attributes)


# --------------------------------------------------------------------------------------
# Checks before any work


def check_numbers(
    window: object = None,
    max_new_tokens: object = 0,
    max_tokens: object = None,
    batch_size: object = 8,
    seed: object = 0,
) -> None:
    """Refuse numbers that :func:`record` does not take; needs no model."""
    whole_number("window", 1 if window is None else window, 1)
    whole_number("max_tokens", 1 if max_tokens is None else max_tokens, 1)
    whole_number("batch_size", batch_size, 1)
    whole_number("max_new_tokens", max_new_tokens, 0)
    whole_number("seed", seed, 0)


def whole_number(name: str, value: object, lowest: int) -> None:
    """Raise a ValueError unless an argument is a whole number from `lowest` up, of 64 bits."""
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        if lowest <= value < 2**63:
            return
        if value > 0:
            raise ValueError(f"{name}={value!r}: give a number below 2 ** 63.")
    raise ValueError(f"{name}={value!r}: give a whole number from {lowest} up.")


def _checked(model: PreTrainedModel) -> PreTrainedModel:
    """The model, if it can be recorded."""
    if getattr(model, "is_twin", False):
        raise ValueError(
            "model is a twin, which has the kept neurons of one prompt only: record the original, "
            "or use flocking.observe around the twin's own generate."
        )
    if model.base_model is not model and hooks_on(model, ("_forward_pre_hooks",)):
        raise ValueError(
            f"{type(model).__name__} has a pre-hook itself, and record runs only what is "
            "inside of it, without its head: register the hook on model.base_model, or below."
        )
    if not all(map(is_loaded, model.modules())):
        raise ValueError(
            f"{type(model).__name__} has weights on the meta device, without values: load them "
            "first."
        )
    return model


def _warn_of_training(model: PreTrainedModel) -> None:
    if model.training:
        warn(
            "The model is in training mode: it is recorded in eval mode (without dropout) and "
            "set back afterwards.",
        )


def _check_memory(
    given: Reading,
    blocks: list[FeedForward],
    raw: list[FeedForward],
    window: int | None,
    max_new_tokens: int,
    ranks: bool,
) -> None:
    """Refuse a recording that would not fit in memory."""
    totals = [length + max(0, max_new_tokens - 1) for length in given.lengths]
    sizes = {
        "sequence": len(totals),
        "layer": len(blocks),
        "neuron": max(block.d_ff for block in blocks),
        "token": max(totals),
    }
    names = ["energy", "mass", "norm", "l1"] + (["rank"] if ranks else [])
    raw_bytes = size_in_bytes(["relative"], {**sizes, "layer": len(raw)})

    def size(window: int | None) -> int:
        windows = 1 + sum(window_counts(given.prompts, totals, window))
        return size_in_bytes(names, {**sizes, "window": windows}) + raw_bytes

    room = int(psutil.virtual_memory().available * _SHARE_OF_MEMORY)
    if size(window) > room:
        wider = [2**power for power in range(6, 32) if size(2**power) <= room]
        if wider:
            remedy = f"window={wider[0]} would fit ({_readable(size(wider[0]))})"
        elif size(None) <= room:
            remedy = f"window=None would fit ({_readable(size(None))})"
        else:
            remedy = "no window would fit: record fewer texts or layers at a time"
        raise MemoryError(
            f"The recording would take {_readable(size(window))} of memory and "
            f"{_readable(room)} may be used: {remedy}."
        )


def _readable(size: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


# --------------------------------------------------------------------------------------
# Forward passes


def _read(
    model: PreTrainedModel, collector: Collector, fed: Prompts, batch_size: int, progress: bool
) -> None:
    """Run all sequences through the model, batch by batch, chunk by chunk."""
    layers = [block.layer for block in collector.blocks]
    lengths = list(map(len, fed.ids))
    ways = with_inputs(model, fed.inputs) if fed.inputs else None
    everywhere = hooks_on_everything()
    if everywhere or any(hooks_on(module, of_weights=False) for module in model.modules()):
        # They may look at other tokens, or count from the end: texts alone, and each in one piece.
        ways = (ways or traits(model))._replace(paddable=False, chunkable=False)
        batch_size = 1
    ones = [torch.ones_like(row) for row in fed.ids]
    groups = batches(model, lengths, batch_size, ways)
    raw = collector.arrays.get("relative")
    # (Beside the bar, not above it: in a notebook, that would be a red box.)
    size = None if raw is None else _readable(raw.nbytes)
    bar_options: dict[str, Any] = {
        "desc": "recording",
        "unit": "token",
        "postfix": size and f"keeping relative activations as float16: {size}",
    }
    with (
        observe(model, collector, layers=layers, routed=True),
        tqdm(total=sum(lengths), disable=not progress, **bar_options) as bar,
    ):
        for rows in groups:
            collector.begin(rows)
            ids = _padded(fed.ids, rows)
            mask = _padded(ones, rows)
            inputs = {name: _padded(values, rows) for name, values in fed.inputs.items()}
            past = None
            for tokens in chunks(model, len(ids), ids.shape[1], ways):
                collector.expect(tokens)
                keep = tokens.stop < ids.shape[1]
                here = {name: values[:, tokens] for name, values in inputs.items()}
                output = forward(model, ids[:, tokens], mask[:, : tokens.stop], past, keep, here)
                past = output.past_key_values if keep else None
                collector.check()
                bar.update(int(mask[:, tokens].sum()))
            collector.end()


def _padded(values: list[Tensor], rows: list[int]) -> Tensor:
    """These rows as one tensor, padded with zeros on the right, where no real token sees them."""
    return nn.utils.rnn.pad_sequence([values[row] for row in rows], batch_first=True)
