"""Greedy decoding in fixed shapes: a step that is compiled once and reused for every prompt.

``generate`` works around the model for each token, launches each of its operations, and gives
every call a cache of its own, for which what was compiled may have to be compiled again. Here a
step reads and writes buffers that never move: it is compiled once, on CUDA devices replayed as a
graph, and nothing is asked of the device in between.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
)

from flocking.feedforward import anything_is_watched
from flocking.models import (
    context,
    device_of,
    embeddings_of,
    parts,
    refuse_forgetful,
    relative_error,
    require_model,
    tolerance,
    undisturbed,
)
from flocking.pruning.twin import Twin

_COMPILER = "inductor"
_OTHER_STATES = "it keeps something else than each token's keys and values"
# Functions that multiply activations by a weight, and which argument the activations are.
_PRODUCTS = {nn.functional.linear: 0, torch.bmm: 0, torch.addmm: 1}
_LOOK_EVERY = 16  # tokens between two looks at whether all sequences have ended


class Decoder:
    """Greedy decoding of a model or a twin, compiled, in shapes that do not depend on the prompt.

    Gives the tokens that ``model.generate(..., do_sample=False)`` gives, up to rounding: of the
    model's generation config only the tokens that end a text, and the one that pads, count (no
    penalties, no sampling). The first call compiles, seconds to minutes; later ones, with prompts
    of any length, do not. On CUDA devices a step is then one graph, replayed.

    Under a twin each prompt is read by the full model and gives the experts, as in ``generate``;
    the step is compiled for the twin's compact projections, whose memory stays where it is.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A decoder-only model, or a twin that :func:`flocking.griffin` made of it, all of whose
        parameters are on one device. It is not changed.
    max_length : int
        Most tokens that a prompt and what follows it may have together. The cache has room for
        so many from the start (sliding windows included, which are masked, not cut), and each
        step reads all of it: no larger than needed.
    batch_size : int
        Sequences that are decoded together.

    Raises
    ------
    ValueError
        If the model cannot be decoded like this (found by a trial on random tokens), lies on
        several devices, or has a context of less than `max_length`.

    Examples
    --------
    >>> decoder = flocking.Decoder(flocking.griffin(model), max_length=1024)
    >>> decoder.generate(**tokenizer("Birds of a feather", return_tensors="pt"), max_new_tokens=64)
    """

    def __init__(self, model: PreTrainedModel, max_length: int, *, batch_size: int = 1) -> None:
        model = require_model(model)
        for name, value in (("max_length", max_length), ("batch_size", batch_size)):
            if not isinstance(value, int):
                raise TypeError(f"{name}={value!r}: give a whole number.")
        if max_length < 2 or batch_size < 1:
            raise ValueError(
                f"max_length={max_length}, batch_size={batch_size}: give at least two tokens and "
                "one sequence."
            )
        if (limit := context(model)) and max_length > limit:
            raise ValueError(
                f"max_length={max_length} is more than the model's context of {limit}: give less."
            )
        devices = sorted({str(p.device) for p in model.parameters()})
        if len(devices) > 1 or devices == ["meta"]:
            raise ValueError(
                f"{type(model).__name__} lies on {', '.join(devices)}: a step in fixed shapes "
                "needs all of it on one device; use generate."
            )
        self._model = model
        self._whole = model._griffin.whole if isinstance(model, Twin) else model
        refuse_forgetful(self._whole)
        self.max_length, self.batch_size = max_length, batch_size
        self._device = device_of(embeddings_of(model))
        self._is_cuda = self._device.type == "cuda"
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self._cache: Cache | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._side: torch.cuda.Stream | None = None  # where steps are run and captured
        self._has_run = False
        self._left = 0  # steps that the last prompt leaves room for
        self._warm = 0  # steps that ran without a graph, some of which must precede one
        with torch.inference_mode(False):  # they outlive any mode that this is called in
            shape = (batch_size, 1)
            self._ids, self._position = self._zeros(*shape), self._zeros(*shape)  # of the next step
            self._done = self._zeros(*shape, dtype=torch.bool)
            self._mask, self._text = (self._zeros(batch_size, max_length) for _ in range(2))
            self._length = self._zeros(1)  # of what is written of the text
            self._set_special_tokens()
        # Where heads share keys and values, sdpa under a mask writes them out for every head;
        # compiled, transformers' eager attention reads them where they are.
        self._attention = "eager" if self._is_cuda and _repeats_keys(model) else None
        if self._attention is not None and self._why_not(self._attention) is not None:
            self._attention = None
        if self._attention is None and (problem := self._why_not(None)) is not None:
            why = str(problem).strip().partition("\n")[0]
            raise ValueError(
                f"{type(model).__name__} cannot be decoded in fixed shapes ({why}): use generate."
            ) from problem
        # Recompilations are counted, and limited, by code object: each decoder has one of its own.
        step = types.FunctionType(
            Decoder._step.__code__.replace(), Decoder._step.__globals__, "_step"
        )
        self._compiled = torch.compile(
            types.MethodType(step, self),
            fullgraph=True,
            dynamic=False,
            backend=_inductor if _COMPILER == "inductor" else _COMPILER,
        )
        self._graph_reads: tuple[int, ...] = ()

    @torch.inference_mode(False)
    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, max_new_tokens: int = 20
    ) -> Tensor:
        """The prompts and what follows them.

        Parameters
        ----------
        input_ids : Tensor of int64, shape (sequence, token)
            As many sequences as `batch_size`.
        attention_mask : Tensor, shape (sequence, token), optional
            1 for real tokens, 0 for padding, which must be on the left; all real if None.
        max_new_tokens : int
            Of each sequence; fewer if all end before.

        Returns
        -------
        Tensor of int64, shape (sequence, token)
            On the model's device. Sequences that ended are filled up as ``generate`` does.

        Raises
        ------
        ValueError
            If there are other numbers of sequences or more tokens than this decoder is made for,
            or padding that is not on the left.
        RuntimeError
            If the model does not compile in one piece.
        """
        self.read(input_ids, attention_mask, max_new_tokens=max_new_tokens)
        for number in range(1, max_new_tokens):
            if number % _LOOK_EVERY == 0 and bool(self._done.all()):
                break
            self.step()
        return self._written(input_ids.shape[1])

    @torch.inference_mode(False)
    @torch.no_grad()
    def read(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, max_new_tokens: int = 1
    ) -> None:
        """Run the prompts, on the full model, and take a first token; a twin's experts are chosen.

        What :meth:`generate` begins with, and with the same parameters; each :meth:`step` then
        adds a token, up to `max_length` in all.
        """
        ids, mask = self._checked(input_ids, attention_mask, max_new_tokens)
        prompt = ids.shape[1]
        self._set_special_tokens()
        self._text.copy_(self._pad.expand_as(self._text))
        self._text[:, :prompt] = ids
        self._length.fill_(prompt)
        self._done.zero_()
        whole = self._whole

        def run() -> object:
            return self._prefill(whole, ids, mask)

        if isinstance(self._model, Twin):
            state = self._model._griffin
            state.copies = 1
            outputs = state.prefill(run, len(ids), mask, None, prompt)
        else:
            outputs = run()
        self._take(outputs.logits[:, -1])
        self._left = self.max_length - prompt - 1
        if (reads := self._addresses()) != self._graph_reads:  # a parameter is somewhere else
            self._graph, self._graph_reads, self._warm = None, reads, 0

    @torch.inference_mode(False)
    @torch.no_grad()
    def step(self) -> None:
        """Compute and take one more token of each sequence.

        Raises
        ------
        RuntimeError
            If no prompt was read, or there is no room for more tokens after it; or if the model
            does not compile in one piece.
        """
        if self._left < 1:
            raise RuntimeError(
                f"there is no room for another token: read a prompt first, of fewer than "
                f"{self.max_length} tokens together with what follows it."
            )
        self._left -= 1
        if not self._is_cuda or anything_is_watched():  # which a graph would not show
            self._run()
        elif self._graph is not None:
            self._graph.replay()
        elif self._warm < 3:  # compiled, tuned and with its workspaces taken, beside the graph
            self._side = self._side or torch.cuda.Stream(self._device)
            self._side.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._side):
                self._run()
            torch.cuda.current_stream(self._device).wait_stream(self._side)
            self._warm += 1
        else:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self._side):
                self._run()
            self._graph = graph
            graph.replay()  # capturing computes nothing

    def _run(self) -> None:
        try:
            # (On a GPU, mixtures of experts are computed for single tokens as in generate.)
            with _attending(self._model, self._attention), self._model._optimize_model_for_decode():
                self._compiled()
        except torch.OutOfMemoryError:
            raise
        except Exception as problem:  # of any kind that tracing and compilers raise
            if self._has_run:
                raise
            why = " ".join(str(problem).split("\n")[:2]).strip()  # a backend's name, then its words
            raise RuntimeError(
                f"{type(self._model).__name__} does not compile in one piece ({why}): use generate."
            ) from problem
        self._has_run = True

    def _why_not(self, attention: str | None) -> Exception | None:
        """What keeps steps with this attention from giving what the model gives; None if nothing.

        Anything that a model raises that knows other caches.
        """
        try:
            self._prove(attention)
        except torch.OutOfMemoryError:
            raise
        except Exception as problem:
            return problem
        return None

    def _addresses(self) -> tuple[int, ...]:
        """Where the parameters are that a graph reads."""
        weights = (p.detach() for p in self._model.parameters())
        return tuple(part.data_ptr() for weight in weights for part in parts(weight))

    def _zeros(self, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self._device)

    def _set_special_tokens(self) -> None:
        """From the generation config as it is now, into the memory that steps read."""
        config = self._model.generation_config
        ends = config.eos_token_id
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        pad = config.pad_token_id
        pad = (ends[0] if ends else 0) if pad is None else pad
        if not hasattr(self, "_ends") or len(self._ends) != len(ends):
            self._ends, self._pad = self._zeros(len(ends)), self._zeros(1)
            self._graph, self._warm = None, 0  # what was captured reads the memory before
        self._ends.copy_(torch.tensor(ends, dtype=torch.int64))
        self._pad.fill_(pad)

    def _checked(
        self, ids: Tensor, mask: Tensor | None, max_new_tokens: int
    ) -> tuple[Tensor, Tensor]:
        """The prompts and their mask on the model's device, or an error."""
        if not isinstance(ids, Tensor) or ids.is_floating_point():
            kind = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
            raise TypeError(
                f"input_ids is {kind}: give token ids as a tensor, as a tokenizer gives them with "
                "return_tensors='pt'."
            )
        if ids.ndim != 2 or len(ids) != self.batch_size or ids.shape[1] == 0:
            raise ValueError(
                f"input_ids has shape {tuple(ids.shape)}: this decoder is for shape "
                f"({self.batch_size}, tokens), the first its batch_size."
            )
        if max_new_tokens < 1 or ids.shape[1] + max_new_tokens > self.max_length:
            raise ValueError(
                f"{ids.shape[1]} tokens and {max_new_tokens} new ones: this decoder is for at "
                f"least one new token, and for {self.max_length} in all."
            )
        mask = torch.ones_like(ids) if mask is None else mask.long()
        if mask.shape != ids.shape or not bool((mask.diff(dim=1) >= 0).all() & mask[:, -1].all()):
            raise ValueError(
                "attention_mask must have the shape of input_ids, and zeros on the left only: pad "
                "with tokenizer.padding_side = 'left'."
            )
        return ids.to(self._device), mask.to(self._device)

    def _read(
        self, whole: PreTrainedModel, ids: Tensor, mask: Tensor, cache: DynamicCache
    ) -> object:
        """Run the prompts as ``generate`` would."""
        more: dict[str, object] = {}
        if self._takes_positions:
            more["position_ids"] = (mask.cumsum(dim=1) - 1).clamp_min(0)
        if "logits_to_keep" in inspect.signature(whole.forward).parameters:
            more["logits_to_keep"] = 1
        return whole(
            input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **more
        )

    def _prefill(self, whole: PreTrainedModel, ids: Tensor, mask: Tensor) -> object:
        """Run the prompts, and take over what they leave in the cache."""
        outputs = self._read(whole, ids, mask, DynamicCache())
        past = getattr(outputs, "past_key_values", None)
        layers = getattr(past, "layers", None) or [None]
        if any(
            type(layer) is not DynamicLayer or layer.get_seq_length() != ids.shape[1]
            for layer in layers
        ):
            raise ValueError(_OTHER_STATES)
        if self._cache is None:
            self._cache = Cache(layers=[StaticLayer(self.max_length) for _ in layers])
        else:
            self._cache.reset()
        for fixed, layer in zip(self._cache.layers, layers, strict=True):
            fixed.update(layer.keys, layer.values)
        self._mask.fill_(1)
        self._mask[:, : ids.shape[1]] = mask
        self._position.copy_(mask.sum(dim=1, keepdim=True))
        return outputs

    def _logits(self, model: PreTrainedModel) -> Tensor:
        """One step's, shape (sequence, vocabulary), over the fixed cache."""
        more = {"position_ids": self._position} if self._takes_positions else {}
        return model(
            input_ids=self._ids,
            attention_mask=self._mask,
            past_key_values=self._cache,
            use_cache=True,
            **more,
        ).logits[:, -1]

    def _step(self) -> None:
        self._take(self._logits(self._model))
        self._position.add_(1)

    def _take(self, logits: Tensor) -> None:
        """The likeliest token of each sequence is its next, all in place."""
        token = torch.where(self._done, self._pad, logits.argmax(dim=-1, keepdim=True))
        self._done.logical_or_((token[..., None] == self._ends).any(dim=-1))
        self._text.index_copy_(1, self._length, token)
        self._length.add_(1)
        self._ids.copy_(token)

    def _written(self, prompt: int) -> Tensor:
        """The text so far, to where the last sequence ended."""
        end = int(self._length)
        if bool(self._done.all()):
            new = self._text[:, prompt:end, None]
            ended = (new == self._ends).any(dim=-1).int()
            end = prompt + 1 + int(ended.argmax(dim=1).max())
        return self._text[:, :end].clone()

    @torch.inference_mode(False)
    @torch.no_grad()
    def _prove(self, attention: str | None) -> None:
        """That steps over the fixed cache give what they give over a cache of the model's own.

        On random tokens, and where the model's own cache forgets (whose window the fixed one
        leaves to the attention's mask), on as many as it takes to see that.
        """
        whole = self._whole
        own = DynamicCache(config=whole.config.get_text_config(decoder=True))
        if not {type(layer) for layer in own.layers} <= {DynamicLayer, DynamicSlidingWindowLayer}:
            raise ValueError(_OTHER_STATES)
        windows = [getattr(layer, "sliding_window", None) for layer in own.layers]
        window = min(filter(None, windows), default=self.max_length)
        total = 16 if window >= self.max_length else max(16, window + 4)
        total = min(total, self.max_length)
        prompt = max(1, total - 2)
        vocabulary = embeddings_of(whole).weight.shape[0]
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch_size, total)
        ids = torch.randint(vocabulary, shape, generator=generator, device="cpu").to(self._device)
        mask = torch.ones_like(ids)
        if self.batch_size > 1:
            mask[0, : prompt // 4] = 0
        positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
        with undisturbed(whole, seed=0):
            self._read(whole, ids[:, :prompt], mask[:, :prompt], own)
            self._prefill(whole, ids[:, :prompt], mask[:, :prompt])
            for place in range(prompt, total):
                here = slice(place, place + 1)
                more = {"position_ids": positions[:, here]} if self._takes_positions else {}
                due = whole(
                    input_ids=ids[:, here],
                    attention_mask=mask[:, : place + 1],
                    past_key_values=own,
                    use_cache=True,
                    **more,
                ).logits[:, -1]
                self._ids.copy_(ids[:, here])
                with _attending(whole, attention):
                    error = relative_error(self._logits(whole), due)
                self._position.add_(1)
                if not error <= tolerance(due.dtype):
                    raise ValueError(f"it gives something else there, relative error {error:.1g}")


@contextmanager
def _attending(model: PreTrainedModel, implementation: str | None) -> Iterator[None]:
    """Another of transformers' attention implementations inside of the block, if one is named.

    The configs of a model and of what it consists of are its own again afterwards.
    """
    if implementation is None:
        yield
        return
    found = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): config for config in found if isinstance(config, PreTrainedConfig)}
    before = {key: config._attn_implementation_internal for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation_internal = implementation
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]


def _repeats_keys(model: PreTrainedModel) -> bool:
    """Whether its attention is sdpa, for which keys and values that heads share are repeated."""
    config = model.config.get_text_config(decoder=True)
    heads, shared = (
        getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads")
    )
    return config._attn_implementation == "sdpa" and shared is not None and shared < heads


def _inductor(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """Compile a step: products with one token as kernels of inductor's own on CUDA devices.

    They read a matrix faster than cuBLAS does, and take in what stands before them, such as norms.
    What an activation function gives is written out first all the same: a kernel that took that in
    would compute it again for every output of the down-projection, which takes longer than reading
    the weights.
    """
    from torch._inductor.compile_fx import compile_fx  # takes its time, and most do not need it

    for node in list(graph.graph.nodes):
        z = node.args[_PRODUCTS[node.target]] if node.target in _PRODUCTS else None
        if z is None or z.target in _PRODUCTS or not _is_of_products_alone(z):
            continue
        value = z.meta["example_value"]
        with graph.graph.inserting_before(node):
            # A view in whose place inductor wants memory, and otherwise nothing.
            written = graph.graph.call_function(
                torch.as_strided, (z, tuple(value.shape), tuple(value.stride()))
            )
        node.replace_input_with(z, written)
    graph.recompile()
    tuned = {"coordinate_descent_tuning": True}
    is_cuda = any(isinstance(x, Tensor) and x.is_cuda for x in inputs)
    return compile_fx(graph, inputs, config_patches=tuned if is_cuda else None)


def _is_of_products_alone(node: torch.fx.Node) -> bool:
    """Whether a value follows from the results of matrix products, and from no other tensor.

    As what enters a down-projection does: norms have weights too, attention its cache.
    """
    seen, rest = set(), [node]
    while rest:
        node = rest.pop()
        if node.op in ("placeholder", "get_attr"):
            return False
        if node not in seen and node.target not in _PRODUCTS:
            seen.add(node)
            rest.extend(node.all_input_nodes)
    return True
