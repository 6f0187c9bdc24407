"""Continuations by a model's own ``generate``, greedy ones or as its arguments say."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import GenerationMode

from flocking.models.copies import hooks_on, working_copy
from flocking.models.problems import brief
from flocking.models.rotary import forget_lengths
from flocking.models.sandbox import private_randomness
from flocking.models.weights import device_of, embeddings_of

# Ways of generating whose result is one text: its own prompt, and new tokens of which the last was
# never fed.
_WAYS = (
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
)

# Arguments of generate that its config does not have, and those of its config and of generate that
# are not the user's here, with what to do instead.
_BESIDE_CONFIG = (
    "logits_processor",
    "negative_prompt_attention_mask",
    "negative_prompt_ids",
    "prefix_allowed_tokens_fn",
    "stopping_criteria",
    "streamer",
)
_FED = "what the model is fed comes from text"
_RETURNED = "a recording is what is returned"
_REFUSED = {
    "attention_mask": _FED,
    "input_ids": _FED,
    "inputs": _FED,
    "inputs_embeds": _FED,
    "past_key_values": _FED,
    "position_ids": _FED,
    "token_type_ids": _FED,
    "output_attentions": _RETURNED,
    "output_hidden_states": _RETURNED,
    "output_logits": _RETURNED,
    "output_scores": _RETURNED,
    "return_dict_in_generate": _RETURNED,
    "assistant_model": "the model continues a text alone here",
    "assistant_tokenizer": "the model continues a text alone here",
    "custom_generate": (
        "generate texts with it yourself, and give them with prompt_tokens=, the numbers of tokens "
        "of their prompts"
    ),
    "generation_config": "give what is in it by name, such as temperature=0.7",
    "max_length": "max_new_tokens says how many tokens are new",
    "synced_gpus": "each process continues its own texts",
}
# What transformers raises for values that it does not check, or finds wrong.
_PROBLEMS = (ArithmeticError, AttributeError, TypeError, ValueError)


def check_generation(arguments: Mapping[str, Any], max_new_tokens: int) -> None:
    """Refuse arguments of ``generate`` that a continuation cannot be made with; needs no model.

    Raises
    ------
    TypeError
        For a name that ``generate`` does not know.
    ValueError
        For one that is set already, a way of generating whose result is not one text with its
        continuation, or values that transformers refuses; and if there is nothing to continue.
    """
    config = _config_of(arguments)
    if not arguments:
        return
    if not max_new_tokens:
        name = next(iter(arguments))
        raise ValueError(
            f"{name} is for a continuation that the model writes: give max_new_tokens too."
        )
    if config.num_return_sequences not in (None, 1):
        raise ValueError(
            f"num_return_sequences={config.num_return_sequences!r}: a text has one continuation. "
            "Give the text several times: each is sampled anew."
        )
    if config.do_sample not in (None, True, False):
        raise ValueError(f"do_sample={config.do_sample!r}: give True or False.")
    try:
        config.validate(strict=True)
        way = config.get_generation_mode()
    except _PROBLEMS as problem:
        raise ValueError(_of_generate(problem)) from problem
    if way not in _WAYS:
        raise ValueError(
            f"these arguments ask for {way.value.replace('_', ' ')}, and texts are continued by "
            "greedy search, sampling or beams: leave them out."
        )


def _config_of(arguments: Mapping[str, Any]) -> Any:
    """The config that arguments of ``generate`` make, if all are the user's to give."""
    config: Any = GenerationConfig()
    for name, value in arguments.items():
        if name in _REFUSED:
            raise ValueError(f"{name} cannot be given: {_REFUSED[name]}.")
        if name.startswith("_") or name not in (*vars(config), *_BESIDE_CONFIG):
            raise TypeError(
                f"record() got an unexpected keyword argument {name!r}: neither it nor "
                "transformers' generate has one of this name."
            )
        if name not in _BESIDE_CONFIG:
            setattr(config, name, value)
    return config


def continued(
    model: PreTrainedModel,
    prompts: list[Tensor],
    max_new_tokens: int,
    progress: bool,
    inputs: Mapping[str, list[Tensor]] | None = None,
    *,
    arguments: Mapping[str, Any] | None = None,
    seed: int = 0,
    earlier: list[int] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[Tensor]:
    """Each prompt with its continuation, without the last token, which is never fed.

    The prompts run one at a time, since some models give other tokens in a batch that is padded
    on the left, as `generate` requires. They run on a copy, so that the penalties and lengths
    in the model's generation config do not apply, and `generate` leaves nothing on the model.

    Without `arguments`, which :func:`check_generation` has passed, the continuation is greedy. With
    them, each prompt has its own random numbers, which depend on nothing but `seed`, its tokens
    and how often it came before, so that others in the list make no difference to it. `earlier` is
    this number, of each; by default, the times that it comes before in the list.

    Raises
    ------
    RuntimeError
        If a hook removes itself meanwhile, so that the text would be read again without it.
    ValueError
        For arguments that transformers refuses only now.
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
    options = dict(arguments or {})
    if options.get("stop_strings") is not None:
        options["tokenizer"] = tokenizer
    device = device_of(embeddings_of(model))
    seeds = _seeds(seed, prompts, earlier) if arguments else None
    sequences = []
    for number, prompt in enumerate(tqdm(prompts, "generating", unit="text", disable=not progress)):
        ids = prompt[None].to(device)
        more = {name: rows[number][None].to(device) for name, rows in (inputs or {}).items()}
        forget_lengths(copied)
        with _as_told(copied, seeds[number] if seeds else None):
            sequence = copied.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                **options,
                **more,
            )[0].cpu()
        if not torch.equal(sequence[: len(prompt)], prompt):
            raise ValueError(
                f"generate changed the tokens of text {number} itself, so that its continuation is "
                f"not this text's: leave out {', '.join(options) or 'max_new_tokens'}."
            )
        sequences.append(sequence[:-1])
        if _all_hooks(model) != before:
            raise RuntimeError(
                "a hook on the model was removed or registered while a continuation was written, "
                "which is then read again without or with it: leave out max_new_tokens, or keep "
                "hooks as they are meanwhile."
            )
    return sequences


def _all_hooks(model: PreTrainedModel) -> list[Any]:
    return [hook for module in model.modules() for hook in hooks_on(module)]


def _seeds(seed: int, prompts: list[Tensor], earlier: list[int] | None) -> list[int]:
    """A seed for each prompt, another one each time that the same tokens come again."""
    seen: Counter[bytes] = Counter()
    seeds = []
    for number, prompt in enumerate(prompts):
        key = prompt.numpy().tobytes()
        times = seen[key] if earlier is None else earlier[number]
        digest = hashlib.sha256(f"{seed} {times} ".encode() + key).digest()
        seen[key] += 1
        seeds.append(int.from_bytes(digest[:8], "big") >> 1)
    return seeds


@contextmanager
def _as_told(model: PreTrainedModel, seed: int | None) -> Iterator[None]:
    """Random numbers from `seed`, and in one sentence what transformers says of its arguments.

    Without a seed there were no arguments, and nothing is changed.
    """
    if seed is None:
        yield
        return
    try:
        with private_randomness(model, seed):
            yield
    except _PROBLEMS as problem:
        raise ValueError(_of_generate(problem)) from problem


def _of_generate(problem: Exception) -> str:
    what = brief(problem).removeprefix("GenerationConfig is invalid: - ")
    return f"transformers' generate cannot use these arguments: {what}."
