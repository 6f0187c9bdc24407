"""The class of a twin: a model's own class, without what would be wrong for a pruned model."""

from __future__ import annotations

import copy
import functools
import html
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import xarray as xr
from torch import Tensor
from transformers import PreTrainedModel

from flocking.analysis import made_of
from flocking.models import (
    byte_count,
    hooks_on,
    html_table,
    modules_of,
    name_and_path,
    named_modules_of,
    unwrap,
    warn,
)
from flocking.pruning.chosen import Kept
from flocking.pruning.history import drawn_up
from flocking.pruning.prompt import Read
from flocking.pruning.reports import Report, held
from flocking.pruning.state import State

if TYPE_CHECKING:

    class _Generating(PreTrainedModel):
        """The model's own class, which :func:`twin_class` adds: what is called of it here."""

        def _prefill(self, *args: Any, **kwargs: Any) -> Any: ...
        def _sample(self, *args: Any, **kwargs: Any) -> Any: ...
        def _beam_search(self, *args: Any, **kwargs: Any) -> Any: ...
        def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any: ...
        def get_compiled_call(self, *args: Any, **kwargs: Any) -> Any: ...
        def generate(self, *args: Any, **kwargs: Any) -> Any: ...
else:
    _Generating = object


class Twin(_Generating):
    """What a twin's class adds to its model's; :func:`flocking.griffin` makes twins."""

    is_twin = True
    _griffin: State  # imported for real: transformers evaluates its subclasses' annotations

    def __repr__(self) -> str:
        """What it is a twin of, what it keeps and why; then the modules, as of any model."""
        title, rows = self._described()
        return "\n".join([title, *(f"  {name}: {text}" for name, text in rows), super().__repr__()])

    def _repr_html_(self) -> str:
        title, rows = self._described()
        modules = f"<summary>modules</summary><pre>{html.escape(super().__repr__())}</pre>"
        return f"{html_table(rows, title)}<details>{modules}</details>"

    def _described(self) -> tuple[str, list[tuple[str, str]]]:
        state = self._griffin
        name, kind = name_and_path(state.full)[0], type(self).__name__
        refresh = "never" if state.refresh is None else f"after every {state.refresh:,} new tokens"
        return f"GRIFFIN twin of {f'{name} ({kind})' if name else f'a {kind}'}", [
            ("selects by", state.made_from.removeprefix("flocking.griffin, ")),
            ("selects again", refresh),
            ("keeps just now", held(state)),
        ]

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """A step's inputs, as of the model."""
        return super().prepare_inputs_for_generation(*args, **kwargs)

    @property
    def selection(self) -> dict[int, Tensor]:
        """Indices of the kept neurons by layer, ascending: int64 (k,), or (sequence, k).

        ``selection.attrs["made_from"]`` says in words how they were selected.
        """
        state = self._griffin
        if state.read is None:
            raise RuntimeError("this twin has no selection yet: call generate first.")
        indices = {layer: c.kept.clone().cpu() for c in state.compacts for layer in c.layers}
        return Kept(indices, self._told(state.read))

    def _told(self, read: Read) -> str:
        state = self._griffin
        texts, tokens = len(read.tokens) // state.copies, int(read.tokens.sum()) // state.copies
        read_by = "the prompt" if texts == 1 else f"the {texts} prompts"
        if len(read.history) > 1:  # other turns, or tokens that the twin wrote
            of = "the text" if texts == 1 else f"the {texts} texts"
            return f"{state.made_from}; made from {tokens:,} tokens of {of}, read so far"
        return f"{state.made_from}; {read_by} had {tokens:,} tokens"

    @property
    def history(self) -> xr.DataArray:
        """Each selection since the last text began, and from where on it was used.

        bool, (position, [sequence,] layer, neuron): True for kept neurons, as of
        :func:`flocking.select`. ``position`` is how many tokens of the text, padding included,
        came before.
        """
        state = self._griffin
        if state.read is None:
            raise RuntimeError("this twin has no selection yet: call generate first.")
        drawn = drawn_up(state.read.history, state.compacts)
        return made_of(drawn, self._told(state.read))

    def report(self) -> Report:
        """Parameters, bytes and times: see :class:`Report`."""
        state = self._griffin
        pruned = [part.original for c in state.compacts for part in c.parts]
        ff = {id(p): p for module in pruned for p in module.parameters()}
        # (Counted apart, and tied ones by name: where accelerate offloads, parameters change.)
        tied = getattr(state.full, "all_tied_weights_keys", {})
        named = dict(state.full.named_parameters())
        selecting, copying = (0.0, 0.0) if state.watch is None else state.watch.seconds()
        held = {name: p for name, p in named.items() if tied.get(name) not in named}
        parameters = sum(p.numel() for p in held.values())
        ff_parameters = sum(p.numel() for p in ff.values())
        ff_bytes = sum(map(byte_count, ff.values()))
        compact = sum(c.parameters for c in state.compacts)
        steps, refreshes = state.work.steps, state.work.refreshes
        pruned_share = steps / (steps + refreshes) if refreshes else 1.0
        density = pruned_share * compact / ff_parameters + 1 - pruned_share
        other_bytes = sum(map(byte_count, held.values())) - ff_bytes
        apart = state.copies if state.selector.scope == "sequence" else 1
        return Report(
            parameters=parameters,
            active_parameters=parameters - ff_parameters + compact,
            ff_bytes=ff_bytes,
            compact_bytes=sum(c.bytes for c in state.compacts),
            prefilled_tokens=(
                0 if state.read is None else int(state.read.tokens.sum()) // state.copies
            ),
            unreached_experts=sum(map(int, state.unreached)) // apart,
            refreshes=refreshes,
            effective_density=density,
            bytes_per_token=other_bytes + round(density * ff_bytes),
            drafted_tokens=state.drafts.proposed,
            accepted_tokens=state.drafts.accepted,
            selection_seconds=selecting,
            copy_seconds=copying,
        )

    def _prefill(
        self,
        input_ids: Tensor,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        is_first_iteration: bool = True,
    ) -> Any:
        if not model_kwargs.get("use_cache", True):
            raise ValueError(
                "use_cache=False, given or in the twin's generation config, would run the prompt "
                "again, pruned, for every token: give use_cache=True."
            )
        if generation_config.guidance_scale not in (None, 1):
            raise ValueError(
                "guidance_scale would run the negative prompt pruned, with the prompt's "
                "selection: leave it out, or use the original model."
            )
        self.warn_of_changes()
        past = model_kwargs.get("past_key_values")
        length = 0 if past is None else int(past.get_seq_length())
        arguments = (input_ids, generation_config, model_kwargs, is_first_iteration)
        if generation_config.is_assistant and length:
            # A draft model is called again and again: the selection stays the prompt's.
            return super()._prefill(*arguments)
        mask = model_kwargs.get("attention_mask")
        if mask is not None:
            mask = mask[:, length:]
        if mask is not None:
            given = mask.shape[1]
        elif "inputs_embeds" in model_kwargs:
            given = None
        else:
            known = length if is_whole(input_ids, generation_config, None) else 0
            given = input_ids.shape[1] - known
        state = self._griffin
        full: Any = state.full  # (transformers types generation apart from models)
        return state.prefill(
            lambda: full._prefill(*arguments),
            len(input_ids),
            mask,
            past if length else None,
            tokens=given,
            copies=max(generation_config.num_beams, generation_config.num_return_sequences),
        )

    def warn_of_changes(self) -> None:
        """Say that what was registered on the twin, or put into it, does not act on prompts."""
        state, hooked, others = self._griffin, [], {}
        for path, module in named_modules_of(self):
            if any(id(hook) not in state.hooks for hook in hooks_on(module)):
                hooked.append(path)
            known = state.modules.get(path)
            if known is None or known() is not module:
                others[path] = id(module)
        if hooked:
            warn(
                f"a hook was registered on the twin ({hooked[0] or 'itself'}): it acts on decoding "
                "only, since the full model reads the prompt. Register it on the original, and "
                "make the twin again.",
            )
        if not others or any(hasattr(each, "set_attention_type") for each in modules_of(self)):
            return  # (BigBird puts others into itself, once a text is short)
        ours = {id(m) for each in state.compacts for part in each.modules for m in part.modules()}
        if put := [path for path, number in others.items() if number not in ours]:
            warn(
                f"a module was put into the twin ({put[0]}): it acts on decoding only, since the "
                "full model reads the prompt. Change the original, and make the twin again.",
            )

    def _sample(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not kwargs["generation_config"].is_assistant:
            return super()._sample(input_ids, *args, **kwargs)
        drafts = self._griffin.drafts
        drafts.settle(input_ids)
        result = super()._sample(input_ids, *args, **kwargs)
        sequences = result if isinstance(result, Tensor) else result.sequences
        drafts.propose(input_ids.shape[1], sequences)
        return result

    def _assisted_decoding(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError(
            "a twin cannot be the main model of assisted or prompt-lookup decoding, where the full "
            "model must check: call generate on the original, with assistant_model=twin."
        )

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """Set it for the full model that reads the prompts, too."""
        super().set_attn_implementation(*args, **kwargs)
        self._griffin.full.set_attn_implementation(*args, **kwargs)

    # What cannot be right is refused with a reason.

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate; refuse decoding loops that would not read the prompt in full."""
        if kwargs.get("custom_generate") is not None:
            raise ValueError(
                "custom_generate would not run the prompt in full: leave it out, or use the "
                "original model."
            )
        with self._griffin.serving():
            if self._griffin.origin is not None:
                self._griffin.origin.follow_generation()
            return super().generate(*args, **kwargs)

    def _get_deprecated_gen_repo(self, generation_mode: Any, *args: Any, **kwargs: Any) -> None:
        """Raise the ValueError below before anybody is asked to trust such code."""
        if super()._get_deprecated_gen_repo(generation_mode, True) is not None:
            self.load_custom_generate()

    def heal_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """The prompts with their last tokens completed, which the full model is asked for."""
        full: Any = self._griffin.full
        return full.heal_tokens(*args, **kwargs)

    def load_custom_generate(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise a ValueError: such loops, contrastive search and DoLa among them, are foreign."""
        raise ValueError(
            "this way to generate is not in transformers itself but code from a hub, which would "
            "not run the prompt in full: leave it out (penalty_alpha, dola_layers, ...), or use "
            "the original model."
        )

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Raise a TypeError: a twin that is pickled would not share any weights."""
        raise TypeError(
            "a twin cannot be pickled or copied: give the original, and make the twin again there."
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Twin:
        """A copy for a trial, which shares weights and selection; others are a TypeError."""
        if not all(id(parameter) in memo for parameter in self.parameters()):
            self.__reduce_ex__(4)
        memo[id(self._griffin)] = self._griffin
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def generate_batch(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise a ValueError: prompts would not be read in full."""
        raise ValueError("a twin cannot batch continuously: use generate, or the original model.")

    def save_pretrained(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise a ValueError: its weights are the original's, and those of one selection."""
        raise ValueError(
            "a twin shares its original's weights and is not saved: write the smaller model with "
            "flocking.export(original, twin.selection, folder), or save the original and make the "
            "twin again."
        )

    def push_to_hub(self, *args: Any, **kwargs: Any) -> NoReturn:  # type: ignore[override] # wrapped
        """Raise a ValueError, as :meth:`save_pretrained` does."""
        self.save_pretrained()

    def to(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override] # wrapped
        """Return the twin if this changes nothing (pipelines call it); else raise a ValueError."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        here = self.device
        same = device is None or (
            device.type == here.type and device.index in (None, here.index or 0)
        )
        if same and dtype in (None, self.dtype):
            return self
        return self._apply()

    def _apply(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError(
            "a twin shares its parameters with the original, which this would change too: change "
            "the original, then make the twin."
        )

    def train(self, mode: bool = True) -> Any:
        """Return the twin, which is in eval mode; a ValueError for training mode."""
        if mode:
            raise ValueError(
                "a twin computes in eval mode, as the full model that reads its prompts does: "
                "train the original."
            )
        return super().train(mode)

    resize_token_embeddings = load_state_dict = requires_grad_ = _apply


def full_model(model: PreTrainedModel) -> PreTrainedModel:
    """The full model that a twin reads prompts with; any other model itself."""
    return model._griffin.full if isinstance(model, Twin) else model


def is_whole(input_ids: Tensor, generation_config: Any, mask: Tensor | None) -> bool:
    """Whether ``generate`` was given all tokens of a conversation, and not the new ones alone.

    It tells so from the mask, which is of all of them, or from what it noted before it dropped
    a mask without padding.
    """
    length = getattr(generation_config, "_mask_length", -1) if mask is None else mask.shape[1]
    return length == input_ids.shape[1]


def refresh_of(model: PreTrainedModel) -> int | None:
    """After how many tokens a twin refreshes its selection; None if never, or for other models."""
    inner = unwrap(model)
    return inner._griffin.refresh if isinstance(inner, Twin) else None


def what_was_read(model: PreTrainedModel) -> Read | None:
    """What a twin's selection was made from, apart from what is read later; or None."""
    if not isinstance(model, Twin) or model._griffin.read is None:
        return None
    return model._griffin.read.copy()


def read_prompt(
    model: PreTrainedModel,
    run: Callable[[], Any],
    sequences: int,
    mask: Tensor | None = None,
    *,
    tokens: int,
) -> Any:
    """What `run` returns, which runs a prompt on the :func:`full_model`; a twin then selects.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A model or a twin.
    run, sequences, mask, tokens
        As of :meth:`flocking.pruning.state.State.prefill`.
    """
    if isinstance(model, Twin):
        model.warn_of_changes()
        return model._griffin.prefill(run, sequences, mask, tokens=tokens)
    return run()


@contextmanager
def serving(model: PreTrainedModel) -> Iterator[None]:
    """Keep other threads' prompts from a twin inside of the ``with``; nothing for other models."""
    with model._griffin.serving() if isinstance(model, Twin) else nullcontext():
        yield


@functools.cache
def twin_class(cls: type[PreTrainedModel], base: type[Twin] = Twin) -> type[PreTrainedModel]:
    """A subclass of the model's class with the same name, which pipelines and configs go by.

    `base` is what it adds to the model's class.
    """
    members: dict[str, Any] = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }

    @functools.wraps(cls.forward)
    def forward(self: Twin, *args: Any, **kwargs: Any) -> Any:
        self._griffin.expect(args, kwargs)
        return cls.forward(self, *args, **kwargs)

    @functools.wraps(cls.prepare_inputs_for_generation)  # whose parameters generate looks at
    def prepare(self: Twin, *args: Any, **kwargs: Any) -> Any:
        return base.prepare_inputs_for_generation(self, *args, **kwargs)

    members |= {"forward": forward, "prepare_inputs_for_generation": prepare}
    return type(cls.__name__, (base, cls), members)
