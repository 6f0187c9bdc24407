"""Proving all candidates of a model in one small forward pass of a trial copy."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import Cache, PreTrainedModel

from flocking.feedforward.candidates import Candidate
from flocking.feedforward.moe import is_experts
from flocking.feedforward.projections import is_plain
from flocking.feedforward.proof import (
    FLIPPED,
    PROBE_SHAPE,
    Proved,
    RefusedError,
    Rows,
    prove,
    prove_recordable,
)
from flocking.models import (
    device_of,
    embeddings_of,
    is_loaded,
    replaced,
    trial,
    trial_copy,
    vocabulary_of,
    with_forward,
)

UNTIMELY = "its up-projection does not run before its down-projection"


class Findings(NamedTuple):
    """What one pass found out, by path of the layer.

    Attributes
    ----------
    proved : dict of str to list of Proved
    refused : dict of str to dict of Candidate to str
        Why the other candidates are not blocks.
    calls : dict of str to int
        How often the layer ran.
    """

    proved: dict[str, list[Proved]]
    refused: dict[str, dict[Candidate, str]]
    calls: dict[str, int]

    @property
    def any(self) -> bool:
        """Whether any block was proved."""
        return any(self.proved.values())


def prove_all(model: PreTrainedModel, candidates: dict[str, list[Candidate]]) -> Findings:
    """Try the candidates of each layer, given by path, when the pass runs that layer.

    Raises
    ------
    Exception
        Whatever the model raises if it cannot be run on a few random tokens.
    """
    found = Findings({}, {}, dict.fromkeys(candidates, 0))
    broken: dict[tuple, str] = {}
    copied = trial_copy(model)
    rows = _rows(copied, candidates)

    def probing(path: str, layer: nn.Module) -> Callable[..., Any]:
        forward = layer.forward

        def run_and_prove(*args: Any, **kwargs: Any) -> Any:
            def run(otherwise: bool = False) -> Any:
                again = {  # from the same cache every time, if the model always uses one
                    name: copy.deepcopy(value) if isinstance(value, Cache) else value
                    for name, value in kwargs.items()
                }
                given = (args, again)
                if otherwise:
                    given = tree_map_only(Tensor, _halved_tokens, given)
                return forward(*given[0], **given[1])

            found.calls[path] += 1
            if found.calls[path] == 1:
                results = _search_layer(layer, candidates[path], run, broken, rows)
                found.proved[path], found.refused[path] = results
            return forward(*args, **kwargs)

        return run_and_prove

    for path in candidates:
        layer = copied.get_submodule(path)
        layer.forward = probing(path, layer)
    with trial(copied):
        try:
            _probe(copied)
        except RuntimeError:
            if is_loaded(embeddings_of(copied)):
                raise
            # Without values, some masks cannot be built from a padding mask.
            found = Findings({}, {}, dict.fromkeys(candidates, 0))
            _probe(copied, masked=False)
    return found


def _halved_tokens(x: Tensor) -> Tensor:
    """Values of tokens, half as large, as layers are given them in most models; else as they are.

    (With the other sign, they would make up for projections whose outputs are negated.)
    """
    of_tokens = x.is_floating_point() and x.ndim == 3 and x.shape[:2] == PROBE_SHAPE
    return x / 2 if of_tokens else x


class _SeenError(Exception):
    """Ends a forward pass of which enough was seen."""


def _rows(copied: PreTrainedModel, layers: Iterable[str]) -> Rows | None:
    """Where the text is, if the first layer is given more rows than there are tokens.

    Some models put a prefix before the text, and some fill it up to whole chunks. The row that
    changes with a token says where the text stands. None if every row is a token.
    """

    def given(changed: bool) -> Tensor | None:
        seen: list[Tensor] = []

        def stop(*args: Any, **kwargs: Any) -> None:
            tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
            seen.extend(x for x in tensors if x.ndim == 3 and x.is_floating_point())
            raise _SeenError

        stopping = {path: with_forward(copied.get_submodule(path), stop) for path in layers if path}
        with replaced(copied, stopping), trial(copied), suppress(Exception):
            _probe(copied, changed)
        return seen[0] if seen else None

    before = given(False)
    if before is None or before.is_meta or before.shape[0] != PROBE_SHAPE[0]:
        return None
    total = before.shape[1]
    if total <= PROBE_SHAPE[1] or (after := given(True)) is None:
        return None
    other = after.ne(before).any(dim=-1)[0].nonzero().flatten().tolist()
    return Rows(other[0] - FLIPPED, total) if len(other) == 1 else None


def _probe(model: PreTrainedModel, changed: bool = False, masked: bool = True) -> None:
    """One small forward pass of random tokens, without the head and without a cache.

    With `changed`, one of the tokens is another; with `masked`, an attention mask is given.
    """
    embeddings = embeddings_of(model)
    generator = torch.Generator().manual_seed(0)
    vocabulary = vocabulary_of(model)
    ids = torch.randint(vocabulary, PROBE_SHAPE, generator=generator, device="cpu")
    if changed:
        ids[0, FLIPPED] = (ids[0, FLIPPED] + 1) % vocabulary
    ids = ids.to(device_of(embeddings))
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    for module in model.modules():  # a cache would carry one trial's tokens into the next
        config: Any = getattr(module, "config", None)
        if hasattr(config, "use_cache"):
            config.use_cache = False
    if not is_loaded(embeddings):  # some implementations look at values, and there are none
        model.set_attn_implementation("eager")
        if any(is_experts(module) for module in model.modules()):
            model.set_experts_implementation("batched_mm")
    if masked:
        inputs["attention_mask"] = torch.ones_like(ids)
    model.base_model(**inputs)


def _order_of_calls(layer: nn.Module, paths: set[str], run: Callable[[], Any]) -> dict[str, int]:
    """The order in which these modules are first called in one run of the layer, if they are."""
    calls: dict[str, int] = {}

    def noting(path: str) -> nn.Module:
        module = layer.get_submodule(path)

        def forward(*args: Any, **kwargs: Any) -> Any:
            calls.setdefault(path, len(calls))
            return module(*args, **kwargs)

        return with_forward(module, forward)

    with replaced(layer, {path: noting(path) for path in paths}):
        run()
    return calls


def _search_layer(
    layer: nn.Module,
    candidates: list[Candidate],
    run: Callable[..., Any],
    broken: dict[tuple, str],
    rows: Rows | None,
) -> tuple[list[Proved], dict[Candidate, str]]:
    """The candidates of one layer of the copy that pass, and why the others do not.

    `broken` remembers, over the layers, candidates with which a layer of this class cannot even
    be run (attention's projections, mostly), so that each is tried only once.
    """
    calls = _order_of_calls(layer, {p for c in candidates for p in (c.down, *c.ups)}, run)
    timely: list[Candidate] = []
    untimely: dict[Candidate, str] = {}
    for candidate in candidates:
        last = calls.get(candidate.down, -1)
        if all(calls.get(up, math.inf) < last for up in candidate.ups):
            timely.append(candidate)
        else:
            untimely[candidate] = UNTIMELY
    found, refused, tried = _prove_by_cutting(layer, timely, run, broken, rows)
    found += _prove_without_cutting(layer, tried, found, run, rows)
    return found, untimely | refused


def _prove_by_cutting(
    layer: nn.Module,
    candidates: list[Candidate],
    run: Callable[..., Any],
    broken: dict[tuple, str],
    rows: Rows | None,
) -> tuple[list[Proved], dict[Candidate, str], list[Candidate]]:
    """The blocks that can be cut; why others cannot; and the projections that were tried."""
    generator = torch.Generator().manual_seed(0)
    found: list[Proved] = []
    refused: dict[Candidate, str] = {}
    tried: list[Candidate] = []
    for candidate in candidates:
        if _is_taken(candidate, found):
            continue
        if candidate.ups:
            tried.append(candidate)
        modules = [layer.get_submodule(path) for path in (candidate.down, *candidate.ups)]
        kinds = tuple((type(m), type(getattr(m, "weight", None))) for m in modules)
        if reason := broken.get((type(layer), candidate, kinds)):
            refused[candidate] = reason
            continue
        try:
            found.append(prove(layer, candidate, run, generator, rows))
        except RefusedError as problem:
            refused[candidate] = str(problem)
        except Exception as problem:  # a wrong candidate may break the layer in any way
            reason = "cut, it fails: " + str(problem).strip().partition("\n")[0]
            refused[candidate] = broken[type(layer), candidate, kinds] = reason
    return found, refused, tried


def _prove_without_cutting(
    layer: nn.Module,
    candidates: list[Candidate],
    cuttable: list[Proved],
    run: Callable[..., Any],
    rows: Rows | None,
) -> list[Proved]:
    """The blocks that can only be recorded, of a layer without blocks that can be cut.

    In a layer with such blocks, only those with weights that cannot be cut. The widest first,
    since gates may look like such blocks too.
    """
    found: list[Proved] = []
    for candidate in sorted(candidates, key=lambda c: (-c.d_ff, -len(c.ups))):
        if _is_taken(candidate, [*cuttable, *found]):
            continue
        paths = (candidate.down, *candidate.ups)
        packed = not all(is_plain(layer.get_submodule(path)) for path in paths)
        if packed or not (cuttable or found):
            with suppress(Exception):  # the first proof has said why it is not a block
                found.append(prove_recordable(layer, candidate, run, rows))
    return found


def _is_taken(candidate: Candidate, found: list[Proved]) -> bool:
    return any(candidate.down == proved.candidate.down for proved in found)
