"""The class of a twin: a model's own, less what would be wrong with a prompt's experts alone."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flocking.models import byte_count
from flocking.pruning.state import State


@dataclass(frozen=True)
class Report:
    """What a twin holds, and what its last prompt cost.

    Attributes
    ----------
    parameters, active_parameters : int
        Of the original, and of those that decoding uses for one sequence.
    ff_bytes, compact_bytes : int
        Of the original's FF projections and of the compact ones. Both are in memory: a twin
        needs more of it, not less, while its original stays loaded.
    prefilled_tokens : int
        Real tokens that the experts were chosen from, all sequences together.
    unreached_experts : int
        Of mixtures of experts, how many no token of the prompt was routed to, layers and (with
        ``scope="sequence"``) sequences added up: their neurons are chosen by their weights.
    drafted_tokens, accepted_tokens : int
        As ``assistant_model``: how many the twin proposed since the last prompt, and how many of
        those the full model took. The last proposal is in neither, as nobody tells its fate.
    selection_seconds, copy_seconds : float
        For choosing the last prompt's experts, and for copying them.
    """

    parameters: int
    active_parameters: int
    ff_bytes: int
    compact_bytes: int
    prefilled_tokens: int
    unreached_experts: int
    drafted_tokens: int
    accepted_tokens: int
    selection_seconds: float
    copy_seconds: float

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align:left'>{name.replace('_', ' ')}</th>"
            f"<td>{value:{',' if isinstance(value, int) else '.4f'}}</td></tr>"
            for name, value in vars(self).items()
        )
        return f"<table>{rows}</table>"


class Twin:
    """What a twin's class adds to its model's: :func:`flocking.griffin` makes them."""

    is_twin = True
    _griffin: State  # imported for real: transformers evaluates its subclasses' annotations

    @property
    def selection(self) -> dict[int, Tensor]:
        """Sorted indices of the experts by layer, int64 (k,), or (sequence, k) by sequence."""
        if self._griffin.read is None:
            raise RuntimeError("no experts were chosen yet: call generate first.")
        compacts = self._griffin.compacts
        return {layer: c.experts.cpu() for c in compacts for layer in c.layers}

    def report(self) -> Report:
        """Parameters, bytes and times: see :class:`Report`."""
        state = self._griffin
        pruned = [part.original for c in state.compacts for part in c.parts]
        ff = {id(p): p for module in pruned for p in module.parameters()}
        # (Counted apart, and tied ones by name: where accelerate offloads, parameters change.)
        tied = getattr(state.whole, "all_tied_weights_keys", {})
        named = dict(state.whole.named_parameters())
        selecting, copying = (0.0, 0.0) if state.watch is None else state.watch.seconds()
        parameters = sum(p.numel() for name, p in named.items() if tied.get(name) not in named)
        rest = parameters - sum(p.numel() for p in ff.values())
        return Report(
            parameters=parameters,
            active_parameters=rest + sum(c.parameters for c in state.compacts),
            ff_bytes=sum(map(byte_count, ff.values())),
            compact_bytes=sum(c.bytes for c in state.compacts),
            prefilled_tokens=(
                0 if state.read is None else int(state.read.tokens.sum()) // state.copies
            ),
            unreached_experts=sum(map(int, state.unreached)),
            drafted_tokens=state.drafted,
            accepted_tokens=state.accepted,
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
                "use_cache=False, given or in the model's config, would run the prompt again, "
                "pruned, for every token: give use_cache=True."
            )
        if generation_config.guidance_scale not in (None, 1):
            raise ValueError(
                "guidance_scale would run the negative prompt pruned, on the prompt's experts: "
                "leave it out, or use the original model."
            )
        past = model_kwargs.get("past_key_values")
        length = 0 if past is None else int(past.get_seq_length())
        arguments = (input_ids, generation_config, model_kwargs, is_first_iteration)
        if generation_config.is_assistant and length:
            # A draft model is asked again and again: the experts stay the prompt's.
            return super()._prefill(*arguments)
        mask = model_kwargs.get("attention_mask")
        if mask is not None:
            mask = mask[:, length:]
        state = self._griffin
        state.copies = max(generation_config.num_beams, generation_config.num_return_sequences)
        if mask is not None:
            given = mask.shape[1]
        elif "inputs_embeds" in model_kwargs:
            given = None
        else:  # the whole conversation, or what is new of it
            given = input_ids.shape[1] - (length if length < input_ids.shape[1] else 0)
        return state.prefill(
            lambda: state.whole._prefill(*arguments),
            len(input_ids),
            mask,
            past if length else None,
            given,
        )

    def _sample(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not kwargs["generation_config"].is_assistant:
            return super()._sample(input_ids, *args, **kwargs)
        state = self._griffin
        state.note_fate(input_ids)
        result = super()._sample(input_ids, *args, **kwargs)
        sequences = result if isinstance(result, Tensor) else result.sequences
        state.draft = (input_ids.shape[1], sequences)
        return result

    def _assisted_decoding(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError(
            "a twin cannot be the main model of assisted or prompt-lookup decoding, whose checks "
            "must be the full model's: call generate on the original, with assistant_model=twin."
        )

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """Of the full model that reads the prompts, too."""
        super().set_attn_implementation(*args, **kwargs)
        self._griffin.whole.set_attn_implementation(*args, **kwargs)

    # What cannot be right is refused with a reason.

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse decoding loops that would not prefill, and generate."""
        if kwargs.get("custom_generate") is not None:
            raise ValueError(
                "custom_generate would not run the prompt in full: leave it out, or use the "
                "original model."
            )
        return super().generate(*args, **kwargs)

    def generate_batch(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse."""
        raise ValueError("a twin cannot batch continuously: use generate, or the original model.")

    def save_pretrained(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse."""
        raise ValueError(
            "a twin holds one prompt's experts: save the original, and make the twin again."
        )

    def push_to_hub(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse."""
        self.save_pretrained()

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Return the twin where that changes nothing (pipelines ask for it), else refuse."""
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

    resize_token_embeddings = load_state_dict = requires_grad_ = _apply


def full_model(model: PreTrainedModel) -> PreTrainedModel:
    """The full model that a twin reads prompts with; any other model itself."""
    return model._griffin.whole if isinstance(model, Twin) else model


@functools.cache
def twin_class(cls: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A subclass of the model's class, under its name: pipelines and configs go by that."""
    members = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }

    @functools.wraps(cls.forward)
    def forward(self: Twin, *args: Any, **kwargs: Any) -> Any:
        self._griffin.expect(args, kwargs)
        return cls.forward(self, *args, **kwargs)

    return type(cls.__name__, (Twin, cls), {**members, "forward": forward})
