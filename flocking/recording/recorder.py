"""``record``: from a model and texts to a labelled Dataset of windowed moments."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib.metadata import version

import numpy as np
import psutil
import torch
import transformers
import xarray as xr
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flocking.feedforward import FeedForward, Routed, feedforwards, observe, select_layers
from flocking.models import (
    Text,
    batches,
    chunks,
    continued,
    forward,
    is_loaded,
    refuse_long,
    require_model,
    tokenize,
    traits,
    undisturbed,
    warn,
)
from flocking.recording.dataset import label
from flocking.recording.moments import Moments
from flocking.recording.windows import Layout, Windows, window_counts

_VERSION = version("flocking")
_SHARE_OF_MEMORY = 0.8  # of what is free, that a recording may take


def record(
    model: nn.Module,
    text: Text,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    window: int | None = 64,
    layers: Iterable[int] | None = None,
    max_new_tokens: int = 0,
    relative: bool | Iterable[int] = False,
    ranks: bool = False,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> xr.Dataset:
    """Record how a model's feed-forward neurons behave along one or more texts.

    Every text is run once (without the language-model head), and per sequence, layer,
    window of tokens and neuron the moments of the relative activations
    ``r_t = |z_t| / ||z_t||_2`` are kept, where ``z_t`` is the input of the FF
    down-projection at token t (Dong, Chen and Chi 2024, arXiv 2404.01365, section 3).

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Any model whose FF blocks :func:`flocking.feedforwards` can prove. Its weights, hooks
        and training flags are as before afterwards. An encoder-decoder is given the text on both
        sides, to its encoder to read and to its decoder as what it has written so far; layers are
        counted through both stacks, and coordinate ``module`` says which is which.
    text : str, list of str, token ids, or a tokenizer's output
        Strings are tokenized with the special tokens that the tokenizer adds by default
        (attribute ``special_tokens`` says which) and no chat template: apply one
        beforehand if you want one. Token ids are one sequence, a list of sequences, or a
        tensor of shape (sequence, token) without padding. In a tokenizer's output,
        padding on either side is dropped by its ``attention_mask``.
    tokenizer : transformers.PreTrainedTokenizerBase, optional
        By default, the one beside the model (``model.name_or_path``).
    window : int or None
        Tokens a window. None: one window a phase beside the first token's.
    layers : iterable of int, optional
        Layers to record; all by default.
    max_new_tokens : int
        If positive, each text is continued greedily, and the continuation is recorded as
        phase ``"generation"`` by replaying the whole text in one pass (exact up to rounding,
        since activations are causal; not so where a rotary embedding depends on the length of
        the text, as longrope's). "Greedily" is plain: no penalty of the model's own
        generation config applies. The last token that was sampled was never fed to the
        model: it has no activations and is not in the recording.
    relative : bool or iterable of int
        Keep ``r`` itself as float16, for all layers or those listed. This is large: how
        large is said before it is taken.
    ranks : bool
        Also keep the sums of standardised ranks that rank consistency needs (slower).
    batch_size : int
        Sequences a forward pass. It changes the speed and, within rounding, nothing else.
    seed : int
        For models whose forward pass is random. The global generators are left alone.
    progress : bool
        Show progress on standard error.

    Returns
    -------
    xarray.Dataset
        Save it with ``.to_zarr(path, zarr_format=2)``. Dimensions: ``sequence``,
        ``layer``, ``window``, ``neuron``, ``token``. Variables:

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
            experts lie side by side; coordinate ``expert`` (layer, neuron) says whose they are
            (-1 in dense layers), ``experts`` (layer) how many there are (1 in dense layers).
        ``relative`` (sequence, layer, token, neuron), float16, with `relative`
            ``r`` itself, NaN at padding. If that is not every recorded layer, its
            dimension ``layer`` is called ``relative_layer``.

        Window 0 is the first token alone; then come the prompt's windows, then the
        generation's, with coordinates ``phase`` and ``start`` (counted from the
        sequence's first token, in phase ``"generation"`` from the first new one).
        ``token_id``, ``token_text`` and ``token_window`` are laid out as (sequence,
        token), with -1 or an empty string at padding; ``text`` (sequence) is each text as
        it was given, ``module`` (layer) the path of each FF block. Attributes name the
        model, its revision and dtype, the versions and the arguments.

    Raises
    ------
    UnsupportedModelError
        If the model's FF blocks cannot be located and proved.
    ValueError
        For an empty text, an unknown layer, a window below 1, a text longer than the
        model's context, weights on the meta device, or activations that are not finite.
    TypeError
        If an argument is of no known form.
    MemoryError
        If the arrays of the result would not fit in memory; before any work is done.

    Examples
    --------
    >>> model, tokenizer = flocking.load()
    >>> recording = flocking.record(model, "The starlings turned as one.")
    >>> flocking.flocking_score(recording).mean("sequence")
    """
    if window is not None:
        _refuse_number("window", window, 1)
    _refuse_number("batch_size", batch_size, 1)
    _refuse_number("max_new_tokens", max_new_tokens, 0)
    _refuse_number("seed", seed, 0)
    model = require_model(model)
    _refuse_model(model, max_new_tokens)
    prompts, texts, tokenizer, special = tokenize(model, text, tokenizer)
    refuse_long(model, prompts, max_new_tokens)
    blocks = select_layers(feedforwards(model), layers)
    raw = (
        select_layers(blocks, None if relative is True else relative, "relative")
        if relative
        else []
    )
    _refuse_large(prompts, blocks, raw, window, max_new_tokens, ranks, progress)

    if model.training:
        warn(
            "The model is in training mode: it is recorded in eval mode (without dropout) and "
            "set back afterwards.",
        )
    with undisturbed(model, seed):
        sequences = prompts
        if max_new_tokens:
            sequences = continued(model, prompts, max_new_tokens, progress)
        layout = Layout.of([len(p) for p in prompts], [len(s) for s in sequences], window)
        recorder = _Recorder(blocks, raw, layout, ranks)
        _run(model, recorder, sequences, batch_size, progress)

    dataset = label(recorder, sequences, texts, tokenizer)
    config = model.config
    return dataset.assign_attrs(
        model=str(getattr(model, "name_or_path", "")),
        revision=str(getattr(config, "_commit_hash", None) or ""),
        architecture=type(model).__name__,
        dtype=str(blocks[0].weight.dtype).removeprefix("torch."),
        special_tokens=special,
        window="phase" if window is None else window,
        max_new_tokens=max_new_tokens,
        seed=seed,
        flocking_version=_VERSION,
        transformers_version=transformers.__version__,
        torch_version=torch.__version__,
    )


# --------------------------------------------------------------------------------------
# What is refused before any work


def _refuse_number(name: str, value: object, lowest: int) -> None:
    if not isinstance(value, int | np.integer) or value < lowest:
        raise ValueError(f"{name}={value!r}: give a whole number from {lowest} up.")


def _refuse_model(model: PreTrainedModel, max_new_tokens: int) -> None:
    name = type(model).__name__
    if getattr(model, "is_twin", False):
        raise ValueError(
            "model is a twin, whose neurons are one prompt's experts: record the original, or use "
            "flocking.observe around the twin's own generate."
        )
    if not all(map(is_loaded, model.modules())):
        raise ValueError(f"{name} has weights on the meta device, without values: load them first.")
    if max_new_tokens and not (model.can_generate() and traits(model).causal):
        raise ValueError(
            f"{name} is no causal language model, so a continuation cannot be replayed: leave out "
            "max_new_tokens, or load its causal class."
        )


def _refuse_large(
    prompts: list[Tensor],
    blocks: list[FeedForward],
    raw: list[FeedForward],
    window: int | None,
    max_new_tokens: int,
    ranks: bool,
    progress: bool,
) -> None:
    """Refuse a recording that would not fit in memory; say how large raw activations are."""
    lengths = [len(prompt) for prompt in prompts]
    totals = [length + max(0, max_new_tokens - 1) for length in lengths]
    d_ff = max(block.d_ff for block in blocks)
    raw_bytes = len(prompts) * len(raw) * max(totals) * d_ff * 2

    def size(window: int | None) -> int:
        windows = 1 + sum(window_counts(lengths, totals, window))
        moments = len(prompts) * len(blocks) * windows * d_ff * 4 * (3 if ranks else 2)
        per_token = len(prompts) * len(blocks) * max(totals) * 4 * 2
        return moments + per_token + raw_bytes

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
    if raw and progress:
        size = _readable(raw_bytes)
        tqdm.write(f"keeping relative activations as float16: {size}", file=sys.stderr)


def _readable(size: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


# --------------------------------------------------------------------------------------
# The passes


class _Recorder:
    """The callback that turns each ``z`` into moments, and the arrays they end up in."""

    def __init__(
        self, blocks: list[FeedForward], raw: list[FeedForward], layout: Layout, ranks: bool
    ) -> None:
        self.blocks, self.raw, self.layout, self.ranks = blocks, raw, layout, ranks
        n, n_tokens = layout.window.shape
        n_windows, d_ff = len(layout.phase), max(block.d_ff for block in blocks)
        self.arrays = {
            name: np.zeros((n, len(blocks), n_windows, d_ff), np.float32)
            for name in (("energy", "mass", "rank") if ranks else ("energy", "mass"))
        }
        for name in ("norm", "l1"):
            self.arrays[name] = np.full((n, len(blocks), n_tokens), np.nan, np.float32)
        if any(block.kind == "experts" for block in blocks):
            experts = max(block.experts for block in blocks)
            self.arrays["routed"] = np.zeros((n, len(blocks), n_windows, experts), np.float32)
        if raw:
            shape = (n, len(raw), n_tokens, d_ff)
            self.arrays["relative"] = np.full(shape, np.nan, np.float16)

    def begin(self, rows: list[int]) -> None:
        """A batch: these sequences, from their first token on."""
        self.rows = rows
        self.real = self.layout.window[rows] >= 0
        self.real = self.real[:, : int(self.real.sum(1).max())]
        self.passes, self.calls = 0, dict.fromkeys(self.blocks, 0)
        # On the layer's own device until the batch ends, and all at once before it begins:
        # allocated one by one in between the large tensors that a pass frees again, these
        # small ones would keep that memory from being reused.
        self.moments = {
            block: Moments.zeros(
                len(rows),
                len(self.layout.phase),
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
        """The next forward pass will bring these tokens of the batch's sequences."""
        self.tokens = tokens
        self.windows = Windows.of(self.layout.window[self.rows, tokens])
        self.passes += 1

    def __call__(self, block: FeedForward, z: Tensor | Routed) -> None:
        windows = self.windows
        n, tokens = windows.weights.shape[::2]
        if block.offset is not None and z.shape[1] != tokens:  # there are rows that are no tokens
            z = z[:, block.offset : block.offset + tokens]
        if z.shape[:-1] not in ((n, tokens), (n * tokens,)):
            raise RuntimeError(
                f"{block.path} was given {tuple(z.shape[:-1])} tokens where {n} x {tokens} were "
                "fed: this model adds, drops or rearranges tokens, which record cannot follow."
            )
        mixed = isinstance(z, Routed)
        z = z.reshape(n, tokens) if mixed else z.reshape(n, tokens, block.d_ff)  # some flatten
        norm, l1 = self.moments[block].update(z, windows)
        self.norms[block][:, :, self.tokens] = torch.stack((norm, l1))
        self.calls[block] += 1
        if block in self.raw:
            z = z.dense() if mixed else z
            r = z.float().abs() / norm.masked_fill(norm == 0, 1)[..., None]
            if windows.padding is not None:
                r.masked_fill_(windows.padding.to(r.device)[..., None], torch.nan)
            here = (self.rows, self.raw.index(block), self.tokens, slice(block.d_ff))
            self.arrays["relative"][here] = r.half().cpu()

    def check(self) -> None:
        """After a forward pass: every block must have run in it, once."""
        for block, calls in self.calls.items():
            if calls != self.passes:
                raise RuntimeError(
                    f"{block.path} did not run exactly once in a forward pass, so that what was "
                    "recorded there belongs to no one token."
                )

    def end(self) -> None:
        """The batch is through: its sums go into the arrays."""
        real = self.real
        for number, block in enumerate(self.blocks):
            norm, l1 = self.norms[block].cpu()
            if not norm[real].isfinite().all():
                bad = (~norm.isfinite() & real).nonzero()
                row, token = bad[bad[:, 1].argmin()].tolist()
                raise ValueError(
                    f"layer {block.layer} ({block.path}) has activations that are not finite, "
                    f"first at token {token} of text {self.rows[row]}: check the weights, or "
                    "load the model in float32 or bfloat16."
                )
            here = (self.rows, number, slice(norm.shape[1]))
            self.arrays["norm"][here] = norm.masked_fill(~real, torch.nan)
            self.arrays["l1"][here] = l1.masked_fill(~real, torch.nan)
            for name, value in self.moments[block].state_dict().items():
                self.arrays[name][self.rows, number, :, : value.shape[-1]] = value.cpu()


def _run(
    model: PreTrainedModel,
    recorder: _Recorder,
    sequences: list[Tensor],
    batch_size: int,
    progress: bool,
) -> None:
    """All forward passes, batch by batch, chunk by chunk."""
    layers = [block.layer for block in recorder.blocks]
    lengths = [len(sequence) for sequence in sequences]
    groups = batches(model, lengths, batch_size)
    with (
        observe(model, recorder, layers=layers, routed=True),
        tqdm(total=sum(lengths), desc="recording", unit="token", disable=not progress) as bar,
    ):
        for rows in groups:
            members = [sequences[row] for row in rows]
            recorder.begin(rows)
            # Padding goes to the right, where no real token sees it.
            ids = nn.utils.rnn.pad_sequence(members, batch_first=True)
            mask = nn.utils.rnn.pad_sequence(list(map(torch.ones_like, members)), batch_first=True)
            past = None
            for tokens in chunks(model, *ids.shape):
                recorder.expect(tokens)
                keep = tokens.stop < ids.shape[1]
                output = forward(model, ids[:, tokens], mask[:, : tokens.stop], past, keep)
                past = output.past_key_values if keep else None
                recorder.check()
                bar.update(int(mask[:, tokens].sum()))
            recorder.end()
