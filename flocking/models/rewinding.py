"""Taking a cache back to where it was, so that tokens can be read into it once more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import Cache, PreTrainedModel, cache_utils
from transformers.cache_utils import DynamicLayer, StaticLayer

from flocking.models.copies import trial_copy
from flocking.models.memo import PerModel
from flocking.models.running import forward
from flocking.models.sandbox import relative_error, tolerance, trial
from flocking.models.weights import vocabulary_of

# (Older versions have not all of them.)
_OTHERS = ("LinearAttentionCacheLayerMixin", "DummyLayer")
_KNOWN = (
    DynamicLayer,
    StaticLayer,
    *(getattr(cache_utils, name) for name in _OTHERS if hasattr(cache_utils, name)),
)


class Bookmark:
    """A place in a cache, to which :meth:`go_back` takes it as often as needed.

    Keys and values that more are added to are cut off again. What is overwritten instead, as by
    sliding windows, convolutions and recurrent layers, is copied here. Also takes back a copy of
    the cache.

    Parameters
    ----------
    cache : transformers.Cache

    Attributes
    ----------
    length : int
        Tokens in the cache, padding included.

    Raises
    ------
    ValueError
        For a cache that cannot be taken back.
    """

    def __init__(self, cache: Any) -> None:
        refuse_unknown(cache)
        self.length = int(cache.get_seq_length())
        self._layers = [_kept_of(layer) for layer in cache.layers]

    def go_back(self, cache: Cache, rows: Tensor | None = None) -> None:
        """Remove what was added to the cache since, in place.

        Parameters
        ----------
        cache : transformers.Cache
        rows : Tensor of int64, shape (sequence,), optional
            Which sequence of the bookmark each sequence of the cache continues, if they were
            reordered since, as in a beam search.
        """
        for layer, kept in zip(cache.layers, self._layers, strict=True):
            values = vars(layer)
            for name, then in kept.items():
                values[name] = _back(values[name], then, rows, layer.is_compileable)

    @contextmanager
    def going_back(self, cache: Cache) -> Iterator[None]:
        """As :meth:`go_back`; if the ``with`` fails, the cache is as it was before."""
        end = int(cache.get_seq_length())
        pairs = zip(cache.layers, self._layers, strict=True)
        before = [_Before(layer, kept, self.length, end) for layer, kept in pairs]
        try:
            self.go_back(cache)
            yield
        except BaseException:
            for each in before:
                each.restore()
            raise


def refuse_unknown(cache: Any) -> None:
    """Raise a ValueError for a cache that a :class:`Bookmark` cannot take back."""
    for layer in cache.layers if isinstance(cache, Cache) else [cache]:
        kind = type(layer)
        if (
            not isinstance(layer, _KNOWN)
            or any("Quantized" in base.__name__ for base in kind.__mro__)  # of one base or another
            or not kind.__module__.startswith("transformers.")
            or (isinstance(layer, StaticLayer) and _has_more(layer))
        ):
            raise ValueError(
                f"{kind.__name__}, in which tokens are cached, cannot be taken back to an earlier "
                "token, as refresh needs: use another cache, or leave refresh out."
            )


def is_even(cache: Any) -> bool:
    """Whether all layers of a cache are known to hold the same tokens.

    After a step that was interrupted, those that had run hold one more. Layers without a length,
    as recurrent ones, do not tell.
    """
    layers = cache.layers if isinstance(cache, Cache) else []
    known = [layer for layer in layers if isinstance(layer, DynamicLayer | StaticLayer)]
    lengths = {int(layer.get_seq_length()) for layer in known}
    return len(known) == len(layers) and len(lengths) == 1 and all(map(_is_whole, known))


def _is_whole(layer: Any) -> bool:
    """Whether a layer's keys and values are of the same tokens."""
    keys, values = layer.keys, layer.values
    return keys is None or bool(keys.shape[-2] == values.shape[-2])


class Seal:
    """Tells whether anything was written to a cache since, or its sequences were reordered.

    Cutting tokens off its end does not break the seal.

    Parameters
    ----------
    cache : transformers.Cache
    """

    def __init__(self, cache: Any) -> None:
        self._length = int(cache.get_seq_length())
        self._parts = list(map(_identity, _tensors_of(cache)))
        self._last = _last_of(cache, self._length)

    def holds(self, cache: Any) -> bool:
        """Whether the cache is still as it was, or shorter."""
        parts = list(map(_identity, _tensors_of(cache)))
        return (
            int(cache.get_seq_length()) <= self._length
            and len(parts) == len(self._parts)
            and all(
                # (A storage that is referred to weakly keeps its address to itself.)
                one[0].cdata == other[0].cdata and one[1] == other[1]
                for one, other in zip(parts, self._parts, strict=True)
            )
            and all(map(torch.equal, _last_of(cache, self._length), self._last))
        )


def _identity(tensor: Tensor) -> tuple[StorageWeakRef, int | None]:
    version = None if tensor.is_inference() else tensor._version
    return StorageWeakRef(tensor.untyped_storage()), version


def _last_of(cache: Any, length: int) -> list[Tensor]:
    """The last token's part of tensors that are written in place without torch counting it."""
    return [
        value[..., length - 1, :].clone()
        for layer in (cache.layers if isinstance(cache, Cache) else [])
        for value in vars(layer).values()
        if isinstance(value, Tensor)
        and layer.is_compileable
        and value.is_inference()
        and value.ndim == 4  # (sequence, head, token, width)
        and 0 < length <= value.shape[-2]
    ]


def _tensors_of(cache: Any) -> list[Tensor]:
    """All tensors that a cache holds."""
    found: list[Tensor] = []
    owners = cache.layers if isinstance(cache, Cache) else [cache]
    rest: list[Any] = [getattr(owner, "__dict__", {}) for owner in owners]
    while rest:
        value = rest.pop()
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, dict):
            rest.extend(value.values())
        elif isinstance(value, list | tuple):
            rest.extend(value)
    return found


def _has_more(layer: StaticLayer) -> bool:
    """Whether a fixed layer holds more by token than keys and values, as an indexer's keys."""
    own = {"keys", "values"}
    return any(
        isinstance(value, Tensor) and value.ndim > 1 and name not in own
        for name, value in vars(layer).items()
    )


class _Shape(tuple[int, ...]):
    """The size of a tensor that more is added to."""


def _kept_of(layer: Any) -> dict[str, Any]:
    """What is needed of a layer, by attribute, to take it back."""
    grows = isinstance(layer, DynamicLayer | StaticLayer) and not layer.is_sliding
    kept: dict[str, Any] = {}
    for name, value in vars(layer).items():
        if name == "record_past":  # how the layer keeps what it keeps, which generate may set later
            continue
        if not (grows and isinstance(value, Tensor) and value.ndim > 1):
            kept[name] = _copied(value)
        elif isinstance(layer, DynamicLayer):
            kept[name] = _Shape(value.shape)
        # What a fixed cache holds behind its length is masked, and written anew.
    return kept


class _Before:
    """What a layer loses when it is taken back and read into anew, and how it gets that back.

    Of keys and values, that is what was added since the bookmark.
    """

    def __init__(self, layer: Any, kept: dict[str, Any], start: int, end: int) -> None:
        self._layer, self._kept, self._places = layer, kept, slice(start, end)
        self._saved = {name: self._save(name, value) for name, value in vars(layer).items()}

    def _save(self, name: str, value: Any) -> Any:
        then = self._kept.get(name)
        if isinstance(then, _Shape):
            grown = [dim for dim, size in enumerate(value.shape) if size != then[dim]]
            return [
                (dim, value.narrow(dim, then[dim], value.shape[dim] - then[dim]).clone())
                for dim in grown
            ]
        if name not in self._kept and isinstance(value, Tensor):  # of a fixed cache
            return value[:, :, self._places].clone()
        return _copied(value)

    def restore(self) -> None:
        """Put the layer back as it was."""
        values = vars(self._layer)
        for name, saved in self._saved.items():
            then, now = self._kept.get(name), values[name]
            if isinstance(then, _Shape):
                now = now[tuple(map(slice, then))]
                for dim, more in saved:
                    now = torch.cat((now, more), dim=dim)
                values[name] = now
            elif name not in self._kept and isinstance(now, Tensor):
                now[:, :, self._places] = saved
            else:
                values[name] = _back(now, saved, None, self._layer.is_compileable)


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return list(map(_copied, value))
    return value


def _back(now: Any, then: Any, rows: Tensor | None, in_place: bool) -> Any:
    """The value of an attribute as it was; `in_place` where it must not move in memory."""
    if isinstance(then, _Shape):
        cut = now[tuple(map(slice, then))]
        if cut.shape != then:
            raise RuntimeError(
                f"the cache is shorter by now than where it should be taken back to: {now.shape}, "
                f"expected at least {tuple(then)}."
            )
        return cut
    if isinstance(then, dict):
        return {key: _back(now.get(key), inner, rows, in_place) for key, inner in then.items()}
    if isinstance(then, list):
        return [_back(old, inner, rows, in_place) for old, inner in zip(now, then, strict=True)]
    if not isinstance(then, Tensor):
        return then
    if rows is not None and then.ndim > 1:
        then = then.index_select(0, rows.to(then.device))
    if in_place and isinstance(now, Tensor) and now.shape == then.shape:
        return now.copy_(then)
    return then.clone()


@PerModel
def rewinds(model: PreTrainedModel) -> bool:
    """Whether tokens can be taken out of the model's own cache, and others be read; by trial.

    On 16 random tokens. Two times, four others are added one by one to the cache and taken out
    again before the next four are read. What the model then gives must be what it gives without a
    cache.
    """
    copied = trial_copy(model)
    generator = torch.Generator().manual_seed(0)
    ids, others = (
        torch.randint(vocabulary_of(copied), (1, 16), generator=generator, device="cpu")
        for _ in range(2)
    )
    ones = torch.ones_like(ids)

    def read(tokens: Tensor, start: int, stop: int, past: Any) -> Any:
        return forward(copied, tokens[:, start:stop], ones[:, :stop], past, keep=True)

    with trial(copied):
        try:
            whole = forward(copied, ids, ones)[0]
            output = read(ids, 0, 8, None)
            states = [output[0]]
            for start in (8, 12):
                past = output.past_key_values
                bookmark = Bookmark(past)
                for place in range(start, start + 4):
                    read(others, place, place + 1, past)
                bookmark.go_back(past)
                output = read(ids, start, start + 4, past)
                states.append(output[0])
            return relative_error(torch.cat(states, dim=1), whole) <= tolerance(whole.dtype)
        except Exception:  # models without such a cache raise errors of any kind
            return False
