"""Running a model: one pass without the head, and what fits its context."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from flocking.models.attributes import noting_changes
from flocking.models.copies import hooks_on, hooks_on_everything, trial_copy
from flocking.models.locks import exclusive
from flocking.models.memo import PerModel, settled
from flocking.models.rotary import forget_lengths, lengths_as_before
from flocking.models.sandbox import private_randomness, trial
from flocking.models.weights import device_of, embeddings_of


@contextmanager
def undisturbed(model: PreTrainedModel, seed: int) -> Iterator[None]:
    """Eval mode, no gradients and random numbers from `seed`; all restored at the end.

    So are rotary embeddings that remember the longest text, which begin as if there was none.
    Another thread that wants the same for this model waits until then.
    """
    with (
        exclusive(model),
        settled(model),
        noting_changes(*model.modules()),
        _in_eval_mode(model),
        lengths_as_before(model),
        torch.no_grad(),
        private_randomness(model, seed),
    ):
        yield


@contextmanager
def _in_eval_mode(model: PreTrainedModel) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    # BigBird's attention becomes a full one for good, in other modules, once a text is short.
    changing: dict[Any, tuple[str, dict[str, Any]]] = {
        module: (str(module.attention_type), dict(module._modules))
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
        for changed, (kind, modules) in changing.items():
            changed.attention_type = kind
            changed._modules.clear()
            changed._modules.update(modules)


@contextmanager
def attention(model: PreTrainedModel, implementation: str | None) -> Iterator[None]:
    """Run with another of transformers' attention implementations; with the model's own for None.

    The configs of the model and of its modules are as before at the end. Other threads that want
    the model to themselves wait until then: two that change its configs would each restore what
    the other has set.
    """
    if implementation is None:
        yield
        return
    with exclusive(model), _attention_set(model, implementation):
        yield


@contextmanager
def _attention_set(model: PreTrainedModel, implementation: str) -> Iterator[None]:
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
    if past is None:
        forget_lengths(model)
    else:
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
    """Most tokens that the model takes at once; None if its configuration does not say.

    Rotary embeddings may reach further than the ``max_position_embeddings`` that they were trained
    with: ``factor`` times as far for type "dynamic", and ``factor`` times
    ``original_max_position_embeddings`` for type "yarn", where models differ in whether the former
    is scaled already. (It is for the other types, as far as is known: "llama3", "longrope", and for
    "linear" in some models.)
    """
    config = model.config.get_text_config()
    names = (
        "max_position_embeddings",
        "max_encoder_position_embeddings",
        "max_decoder_position_embeddings",
        "max_target_positions",
        "max_seq_len",
    )
    limits = [getattr(config, name, None) for name in names]
    if limits[0]:
        limits[0] = _reach(limits[0], getattr(config, "rope_parameters", None))
    limits += [table.num_embeddings - 1 - before for table, before in _padded_positions(model)]
    return min((limit for limit in limits if limit and limit > 0), default=None)


def _reach(positions: int, rope: Any) -> int:
    """How far rotary embeddings of `positions` reach: the nearest, if layers have their own."""
    if not isinstance(rope, Mapping) or not rope:
        return positions
    if all(isinstance(each, Mapping) for each in rope.values()):
        return min(_reach(positions, each) for each in rope.values())
    kind, factor = rope.get("rope_type"), rope.get("factor") or 1
    if kind == "dynamic":
        return max(positions, int(factor * positions))
    if kind == "yarn":
        return max(positions, int(factor * (rope.get("original_max_position_embeddings") or 0)))
    return positions


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
    model: PreTrainedModel,
    prompts: list[Tensor],
    max_new_tokens: int = 0,
    remedy: str = "",
    called: str = "text {}",
) -> None:
    """Raise a ValueError for the first text that does not fit the model's :func:`context`.

    `remedy` is the argument with which the caller's user reads the beginning of a text only, and
    `called` what that user knows a text as, by its number.
    """
    limit = context(model)
    fed = max(0, max_new_tokens - 1)  # the last new token is never fed back
    for number, prompt in enumerate(prompts):
        if limit and len(prompt) + fed > limit:
            new = f" and {max_new_tokens} new ones" if max_new_tokens else ""
            count = f"{len(prompt)} token{'s' * (len(prompt) != 1)}"
            what = _remedies(limit, len(prompt), fed, remedy)
            raise ValueError(
                f"{called.format(number)} has {count}{new}, {len(prompt) + fed - limit} more "
                f"than the model's context of {limit}: {what}."
            )


def _remedies(limit: int, tokens: int, fed: int, remedy: str) -> str:
    """What to do about a prompt of so many tokens, after which so many new ones are fed."""
    if tokens > limit and fed >= limit:
        return "shorten it, and ask for fewer new tokens"
    ways = ["shorten it", "split it"] if tokens > 1 and fed < limit else []
    if tokens <= limit and fed:
        ways.append(f"ask for at most {limit - tokens + 1} new tokens")
    if remedy and fed < limit:
        ways.append(f"read its beginning only: {remedy}={limit - fed}")
    *others, last = ways
    return f"{', '.join(others)}{',' * (len(others) > 1)} or {last}" if others else last
