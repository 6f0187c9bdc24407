"""Running a model: one pass without the head, greedy continuations, and what fits its context."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from flocking.models.copies import hooks_on, hooks_on_everything, trial_copy, working_copy
from flocking.models.locks import exclusive
from flocking.models.memo import PerModel
from flocking.models.sandbox import private_randomness, trial
from flocking.models.weights import device_of, embeddings_of


@contextmanager
def undisturbed(model: PreTrainedModel, seed: int) -> Iterator[None]:
    """Eval mode, no gradients and random numbers from `seed`; all restored at the end.

    Another thread that wants the same for this model waits until then.
    """
    with exclusive(model), _in_eval_mode(model), torch.no_grad(), private_randomness(model, seed):
        yield


@contextmanager
def _in_eval_mode(model: PreTrainedModel) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    # BigBird's attention becomes a full one for good, once a text is short.
    kinds: dict[Any, str] = {
        module: str(module.attention_type)
        for module in model.modules()
        if hasattr(module, "set_attention_type")
    }
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
        for changed, kind in kinds.items():
            if changed.attention_type != kind:
                changed.set_attention_type(kind)


@contextmanager
def attention(model: PreTrainedModel, implementation: str | None) -> Iterator[None]:
    """Run with another of transformers' attention implementations; with the model's own for None.

    The configs of the model and of its modules are as before at the end.
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


def forward(
    model: PreTrainedModel,
    ids: Tensor,
    mask: Tensor,
    past: Any = None,
    keep: bool = False,
    inputs: Mapping[str, Tensor] | None = None,
) -> Any:
    """One pass without the head.

    An encoder-decoder is given the text on both sides; its encoder gets the other inputs.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    ids : Tensor of int64, shape (sequence, token)
        On any device.
    mask : Tensor of int64, shape (sequence, token)
        1 for real tokens, those of `past` included.
    past : transformers.Cache, optional
        The cache of the tokens before.
    keep : bool
        Whether to return a cache without `past` too.
    inputs : dict of Tensor, shape (sequence, token, ...), optional
        What else the model takes for each of `ids`, by name, on any device.
    """
    base = model.base_model
    # Hooks on it fire only where they do with the head, too.
    hooked = base is not model and (hooks_on(base) or hooks_on_everything())
    run = base.forward if hooked and not _calls_base(model) else base
    device = device_of(embeddings_of(model))
    fed: dict[str, Any] = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
    accepted = inspect.signature(base.forward).parameters
    if model.config.is_encoder_decoder and "decoder_input_ids" in accepted:
        fed["decoder_input_ids"] = fed["input_ids"]
        if "decoder_attention_mask" in accepted:
            fed["decoder_attention_mask"] = fed["attention_mask"]
    fed |= {name: values.to(device) for name, values in (inputs or {}).items()}
    if past is not None:
        fed["past_key_values"] = past
    if "use_cache" in accepted:
        fed["use_cache"] = keep or past is not None
    if not getattr(model.config, "return_dict", True):
        fed["return_dict"] = True
    return run(**fed)


@PerModel
def _calls_base(model: PreTrainedModel) -> bool:
    """Whether the model with its head calls its base model; OPT calls what is inside of that."""
    copied = trial_copy(model)
    base: Any = copied.base_model
    calls = []

    class Noted(type(base)):  # type: ignore[misc]  # a class that is known only here
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            calls.append(self)
            return super().__call__(*args, **kwargs)

    base.__class__ = Noted
    ids = torch.ones((1, 2), dtype=torch.int64, device=device_of(embeddings_of(copied)))
    fed = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        fed["decoder_input_ids"] = ids
    try:
        with trial(copied):
            copied(**fed)
    except Exception:  # of any kind: a model that cannot be run like this is taken for a usual one
        return True
    return bool(calls)


def context(model: PreTrainedModel) -> int | None:
    """Most tokens that the model takes at once; None if its configuration does not say."""
    config = model.config.get_text_config()
    names = (
        "max_position_embeddings",
        "max_encoder_position_embeddings",
        "max_decoder_position_embeddings",
        "max_target_positions",
        "max_seq_len",
    )
    limits = [getattr(config, name, None) for name in names]
    limits += [table.num_embeddings - 1 - before for table, before in _padded_positions(model)]
    return min((limit for limit in limits if limit and limit > 0), default=None)


def first_position(model: PreTrainedModel) -> int:
    """The first token's position: 0, unless positions start behind a padding index."""
    return max((before + 1 for _, before in _padded_positions(model)), default=0)


def _padded_positions(model: PreTrainedModel) -> Iterator[tuple[Any, int]]:
    """Tables of positions with a padding index, and that index: RoBERTa's start after it."""
    for path, module in model.named_modules():
        before = getattr(module, "padding_idx", None)
        if path.endswith("position_embeddings") and isinstance(before, int):
            yield module, before


def refuse_long(
    model: PreTrainedModel, prompts: list[Tensor], max_new_tokens: int = 0, remedy: str = ""
) -> None:
    """Raise a ValueError for the first text that does not fit the model's :func:`context`.

    `remedy` is the argument with which the caller's user reads the beginning of a text only.
    """
    limit = context(model)
    fed = max(0, max_new_tokens - 1)  # the last new token is never fed back
    for number, prompt in enumerate(prompts):
        if limit and len(prompt) + fed > limit:
            new = f" and {max_new_tokens} new ones" if max_new_tokens else ""
            what = "shorten it or split it"
            if remedy and fed < limit:
                what = f"shorten it, split it, or read its beginning only: {remedy}={limit - fed}"
            raise ValueError(
                f"text {number} has {len(prompt)} tokens{new}, {len(prompt) + fed - limit} more "
                f"than the model's context of {limit}: {what}."
            )


def continued(
    model: PreTrainedModel,
    prompts: list[Tensor],
    max_new_tokens: int,
    progress: bool,
    inputs: Mapping[str, list[Tensor]] | None = None,
) -> list[Tensor]:
    """Each prompt with its greedy continuation, without the last token, which is never fed.

    The prompts run one at a time, since some models give other tokens in a batch that is padded
    on the left, as `generate` requires. They run on a copy, so that the penalties and lengths
    in the model's generation config do not apply, and `generate` leaves nothing on the model.

    Raises
    ------
    RuntimeError
        If a hook removes itself meanwhile, so that the text would be read again without it.
    """
    before = _all_hooks(model)
    copied: Any = working_copy(model)
    given: Any = model.generation_config
    eos = given.eos_token_id
    pad = given.pad_token_id
    if pad is None:  # nothing is padded, but generate asks for one
        pad = (eos[0] if isinstance(eos, list) else eos) or 0
    copied.generation_config = GenerationConfig(
        bos_token_id=given.bos_token_id, eos_token_id=eos, pad_token_id=pad
    )
    device = device_of(embeddings_of(model))
    sequences = []
    for number, prompt in enumerate(tqdm(prompts, "generating", unit="text", disable=not progress)):
        ids = prompt[None].to(device)
        more = {name: rows[number][None].to(device) for name, rows in (inputs or {}).items()}
        sequence = copied.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            **more,
        )[0]
        sequences.append(sequence[:-1].cpu())
        if _all_hooks(model) != before:
            raise RuntimeError(
                "a hook on the model was removed or registered while a continuation was written, "
                "which is then read again without or with it: leave out max_new_tokens, or keep "
                "hooks as they are meanwhile."
            )
    return sequences


def _all_hooks(model: PreTrainedModel) -> list[Any]:
    return [hook for module in model.modules() for hook in hooks_on(module)]
