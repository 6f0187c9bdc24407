"""``record``: from a model and texts to a labelled Dataset of windowed moments."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import xarray as xr
from torch import nn
from transformers import PreTrainedTokenizerBase

from flocking.models import Chats, Text, require_model
from flocking.recording.arguments import Options
from flocking.recording.continuations import Wanted, given_texts
from flocking.recording.forward_passes import (
    check_memory,
    chosen_blocks,
    lengths_of,
    recordable,
    recorded,
    refuse_unfit,
    warn_of_training,
)
from flocking.recording.streaming import refuse_without_out, stream


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
    out: str | os.PathLike[str] | None = None,
    num_texts: int | None = None,
    on_error: str = "stop",
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
    out : str or Path, optional
        A Zarr store, whose name ends in ``.zarr``, to write the recording to, block by block:
        memory does not grow with the number of texts. `text` is then any iterable of strings, of
        sequences of token ids, or of conversations: a list, a generator, a column of a dataset.
        What is returned is the store, opened as by :func:`flocking.open_recording`. The same call
        goes on with a store that is not finished, whatever ended the run; at most the block in
        work is recorded again. Several processes, as torchrun or accelerate start them, share the
        texts. Texts that can be read only once need `max_tokens` where the model has no longest
        context, and have windows for prompts of this length where there are continuations.
    num_texts : int, optional
        With `out`, how many texts there are, if `text` has no length. Several processes need it.
    on_error : {"stop", "skip"}
        With `out`, whether a text that cannot be recorded ends the run (what is done is kept) or is
        left out. Attribute ``skipped`` then lists which were, and why; the others keep their
        numbers, coordinate ``sequence``.
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
        revision and dtype, PEFT's adapters (with a digest of what they add) and autocast, both
        ``"none"`` without, the versions and the arguments; ``generation`` is ``"none"``,
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
        arguments that ``generate`` cannot use here. With `out`, if something else is there, or a
        recording that was begun with other texts, another model or other arguments.
    TypeError
        If `model` is not a transformers model, `tokenizer` is no tokenizer, or `text` or a list
        of layers has another form; for an argument that neither this nor ``generate`` knows.
    MemoryError
        If the arrays of the result would not fit in memory. This is checked first.
    OSError
        With `out`, if it cannot be written, the disk has no room for the next texts, or another
        process is writing it.

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

    More texts than memory holds recordings of:

    >>> corpus = (passage for passage in flocking.passages())
    >>> recording = flocking.record(
    ...     model, corpus, out="corpus.zarr", max_tokens=16, progress=False
    ... )
    >>> flocking.flocking_score(recording).mean("sequence").dims
    ('layer',)
    """
    options = Options(
        Wanted(prompt_tokens, continuation, max_new_tokens, generation),
        window,
        layers,
        max_tokens,
        relative,
        ranks,
        batch_size,
        seed,
    ).checked()
    if out is not None:
        return stream(
            model,
            text,
            out,
            tokenizer=tokenizer,
            options=options,
            num_texts=num_texts,
            on_error=on_error,
            progress=progress,
        )
    refuse_without_out(num_texts, on_error)
    model = recordable(require_model(model))
    given = given_texts(model, text, tokenizer, options.wanted, max_tokens)
    refuse_unfit(model, given, options)
    blocks, raw = chosen_blocks(model, options)
    check_memory(blocks, raw, options, *lengths_of(given, options))
    warn_of_training(model)
    return recorded(model, given, blocks, raw, options, progress)
