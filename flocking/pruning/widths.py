"""Which fields of a config say how wide a model's FF blocks are, found out by trial.

A model of the same class is built from a changed config on the meta device, where it has shapes
and no values. A field is one of the blocks' width if just the blocks' projections change with it,
along their neurons and in proportion.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from flocking.feedforward import FeedForward, stored_transposed
from flocking.feedforward import moe as mixtures
from flocking.models import byte_count

_Path = tuple[str | int, ...]
_Shapes = dict[str, tuple[int, ...]]

# Grouped matrix products need rows of a multiple of 16 bytes: of so many numbers in any dtype of
# two bytes or more.
_MULTIPLE = 8


class Along(NamedTuple):
    """Where a weight has neurons.

    Attributes
    ----------
    axis : int
    times : int
        Places of each neuron along it: two where gate and up are fused.
    """

    axis: int
    times: int

    def width(self, shape: Sequence[int]) -> int | None:
        """Number of neurons of a weight of this shape; None if it cannot be one of these."""
        whole, rest = divmod(shape[self.axis], self.times) if len(shape) > self.axis else (0, 1)
        return None if rest else whole

    def shape(self, shape: Sequence[int], width: int) -> tuple[int, ...]:
        """The shape with this number of neurons."""
        return (*shape[: self.axis], self.times * width, *shape[self.axis + 1 :])


class Sized(NamedTuple):
    """A block, and its weights that have neurons.

    Attributes
    ----------
    block : FeedForward
    width : int
        Number of neurons; in a mixture, of each expert.
    weights : dict of Along
        By their names in the model's state dict.
    """

    block: FeedForward
    width: int
    weights: dict[str, Along]

    def found_in(self, shapes: _Shapes) -> int | None:
        """The block's width in a model of these shapes; None if its weights differ in it."""
        widths = {
            along.width(shapes[name]) if name in shapes else None
            for name, along in self.weights.items()
        }
        return widths.pop() if len(widths) == 1 else None


def sized(model: PreTrainedModel, blocks: Iterable[FeedForward]) -> list[Sized]:
    """Each block with its weights."""
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)
    found = []
    for block in blocks:
        weights = {
            f"{path}.{name}": along
            for part in dict.fromkeys((block.up, block.gate, block.down))
            if part is not None
            for name, along in _along(block, part)
            for path in paths[part]
        }
        found.append(Sized(block, block.d_ff // block.experts, weights))
    return found


def _along(block: FeedForward, part: nn.Module) -> Iterator[tuple[str, Along]]:
    if block.kind == "experts":
        for name, axis, fused in mixtures.axes(part):
            yield name, Along(axis, 2 if fused else 1)
        return
    transposed = stored_transposed(part)
    if part is block.down:
        yield "weight", Along(0 if transposed else 1, 1)
        return
    times = 2 if block.kind == "fused" else 1
    yield "weight", Along(1 if transposed else 0, times)
    if part._parameters.get("bias") is not None:
        yield "bias", Along(0, times)


def narrowed(
    model: PreTrainedModel, parts: Sequence[Sized], wanted: Sequence[int]
) -> tuple[PreTrainedConfig, list[int]]:
    """A config of narrower blocks, and the widths that it says.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    parts : list of Sized
        All of its blocks.
    wanted : list of int
        The width that each block needs at least; in a mixture, each expert.

    Returns
    -------
    transformers.PreTrainedConfig
        A copy of the model's with other widths.
    list of int
        The width of each block in a model of that config.

    Raises
    ------
    ValueError
        If the config cannot say it, or the model has other weights than its config says.
    """
    trials = _Trials(model, parts)
    pairs = zip(parts, wanted, strict=True)
    narrower = [n for n, (part, width) in enumerate(pairs) if width < part.width]
    governed: dict[int, tuple[_Field, int]] = {}
    for field in trials.fields():
        if all(number in governed for number in narrower):
            break
        for number, place in trials.governed_by(field).items():
            governed.setdefault(number, (field, place))
    together: dict[tuple[_Field, int], list[int]] = {}
    for number, said in governed.items():
        together.setdefault(said, []).append(number)
    config = copy.deepcopy(model.config)
    for field in dict.fromkeys(field for field, _ in together):
        new = {
            place: _number(field, place, [(parts[n], wanted[n]) for n in numbers])
            for (other, place), numbers in together.items()
            if other == field
        }
        field.put(config, new)
    if lacking := [number for number in narrower if number not in governed]:
        raise ValueError(trials.why_not(lacking, several=len(lacking) < len(narrower)))
    return config, trials.widths_of(config, wanted)


def bytes_after(model: PreTrainedModel, parts: Sequence[Sized], widths: Sequence[int]) -> int:
    """Bytes of a model's parameters when its blocks have these widths."""
    named = dict(model.named_parameters(remove_duplicate=False))
    sizes = {id(weight): byte_count(weight) for weight in named.values()}
    for part, width in zip(parts, widths, strict=True):
        for name in part.weights:
            weight = named[name]
            sizes[id(weight)] = byte_count(weight) * width // part.width
    return sum(sizes.values())


def _number(field: _Field, place: int, said: Sequence[tuple[Sized, int]]) -> int:
    """What has to stand in a field, for the narrowest blocks that have these widths at least."""
    least = _least(said)
    pairs = zip(said, least, strict=True)
    number = max(-(-width * field.number(place, part) // part.width) for (part, _), width in pairs)
    # (It may be the number of a shared expert, which is as wide as several others.)
    experts = [
        (part, field.number(place, part)) for part, _ in said if part.block.kind == "experts"
    ]
    while any(number < now and number * part.width // now % _MULTIPLE for part, now in experts):
        number += 1
    return number


def _least(said: Sequence[tuple[Sized, int]]) -> list[int]:
    """The narrowest that blocks of one field can be."""
    multiple = _MULTIPLE if any(part.block.kind == "experts" for part, _ in said) else 1
    return [min(part.width, width + -width % multiple) for part, width in said]


# --------------------------------------------------------------------------------------
# Fields


class _Field(NamedTuple):
    """A number in a config, several in a list, or a place where a number may be.

    Attributes
    ----------
    path : tuple of str or int
        Names of attributes, keys and places in lists that lead to it.
    values : tuple of int
        The number or numbers; empty where there is None.
    is_list : bool
    """

    path: _Path
    values: tuple[int, ...]
    is_list: bool = False

    def __str__(self) -> str:
        return ".".join(map(str, self.path))

    def number(self, place: int, part: Sized) -> int:
        """What stands there for a block; its width where that is the default."""
        return self.values[place] if self.values else part.width

    def put(self, config: PreTrainedConfig, new: Mapping[int, int]) -> None:
        """Give numbers, by their place in the list."""
        numbers = [new.get(place, value) for place, value in enumerate(self.values)]
        numbers = numbers or [new[0]]
        holder: Any = config
        for step in self.path[:-1]:
            holder = _member(holder, step)
        value: Any = numbers if self.is_list else numbers[0]
        if isinstance(holder, PreTrainedConfig):
            setattr(holder, str(self.path[-1]), value)
        else:
            holder[self.path[-1]] = value


def _member(holder: Any, step: str | int) -> Any:
    return getattr(holder, str(step)) if isinstance(holder, PreTrainedConfig) else holder[step]


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _fields_in(holder: Any, path: _Path = ()) -> Iterator[_Field]:
    """Numbers, lists of numbers and None, anywhere in a config."""
    if isinstance(holder, PreTrainedConfig):
        members: Iterable[tuple[Any, Any]] = vars(holder).items()
    elif isinstance(holder, dict):
        members = holder.items()
    else:
        members = enumerate(holder)
    for name, value in members:
        here = (*path, name)
        if str(name).startswith("_"):
            continue
        if _is_whole(value):
            yield _Field(here, (value,))
        elif value is None and isinstance(holder, PreTrainedConfig):
            yield _Field(here, ())
        elif isinstance(value, list | tuple) and value and all(map(_is_whole, value)):
            yield _Field(here, tuple(value), is_list=True)
        elif isinstance(value, PreTrainedConfig | dict | list | tuple):
            yield from _fields_in(value, here)


# --------------------------------------------------------------------------------------
# Trials


class _Trials:
    """Models of one class on the meta device, of changed configs.

    Attributes
    ----------
    others : dict of (set of int, list of str)
        Of fields that change more than blocks: numbers of the blocks, and the other weights.
    """

    def __init__(self, model: PreTrainedModel, parts: Sequence[Sized]) -> None:
        self.model, self.parts = model, parts
        self.name = type(model).__name__
        self.others: dict[_Field, tuple[set[int], list[str]]] = {}
        self.base = self._checked_base()

    def _checked_base(self) -> _Shapes:
        """Shapes of a model of the config as it is, which must be those of the model."""
        try:
            base = self._shapes(self.model.config)
        except Exception as problem:  # a class may fail in any way
            raise ValueError(
                f"{self.name} cannot be exported: it cannot be made from its config alone "
                f"({type(problem).__name__}: {str(problem).partition(chr(10))[0]})."
            ) from problem
        mine = _shapes_of(self.model)
        for name in sorted({*base, *mine}):
            if base.get(name) != mine.get(name):
                raise ValueError(
                    f"{self.name} cannot be exported: its weights are not those of its class and "
                    f"config ({name} {_differs(mine.get(name), base.get(name))}). Merge adapters "
                    "(merge_and_unload), remove masks and parametrizations, and let the config say "
                    "what was changed."
                )
        return base

    def _shapes(self, config: PreTrainedConfig) -> _Shapes:
        with torch.device("meta"), torch.no_grad():
            return _shapes_of(type(self.model)(copy.deepcopy(config)))

    def fields(self) -> Iterator[_Field]:
        """Fields that may say a width, the likeliest first."""
        widths = {part.width for part in self.parts}
        found = list(_fields_in(self.model.config))
        yield from (f for f in found if f.values and widths.intersection(f.values))
        # What stands for a default; by their names, so that fewer have to be tried.
        unset = [f for f in found if not f.values]
        yield from sorted(unset, key=lambda f: not _sounds_like_width(str(f)))
        # What the width is a multiple of, such as a ratio, or a fraction.
        for field in found:
            value = field.values[0] if len(field.values) == 1 and not field.is_list else 0
            if value > 1 and any(w != value and w % value * (value % w) == 0 for w in widths):
                yield field

    def governed_by(self, field: _Field) -> dict[int, int]:
        """The blocks whose width a field says, by number, and the places of their numbers."""
        # Numbers that are nowhere yet, each another one, which whatever divides these divides too.
        largest = max(field.values or [part.width for part in self.parts])
        tried = {place: (place + 2) * largest for place in range(max(1, len(field.values)))}
        config = copy.deepcopy(self.model.config)
        try:
            field.put(config, tried)
            shapes = self._shapes(config)
        except Exception:  # it has to be something else
            return {}
        changed = {n for n in {*self.base, *shapes} if self.base.get(n) != shapes.get(n)}
        governed: dict[int, int] = {}
        for number, part in enumerate(self.parts):
            found = part.found_in(shapes)
            if found is None or found == part.width:
                continue
            for place, new in tried.items():
                if found * field.number(place, part) == new * part.width:
                    governed[number] = place
                    changed -= {
                        name
                        for name, along in part.weights.items()
                        if shapes[name] == along.shape(self.base[name], found)
                    }
        if governed and changed:
            self.others[field] = {*governed}, sorted(changed)
        return {} if changed else governed

    def widths_of(self, config: PreTrainedConfig, wanted: Sequence[int]) -> list[int]:
        """The blocks' widths in a model of this config, in which nothing else may have changed."""
        try:
            shapes = self._shapes(config)
        except Exception as problem:
            raise ValueError(
                f"{self.name} cannot be made with FF blocks of {max(wanted)} neurons "
                f"({type(problem).__name__}: {str(problem).partition(chr(10))[0]}): keep another "
                "number."
            ) from problem
        expected, widths = dict(self.base), []
        for part, least in zip(self.parts, wanted, strict=True):
            width = part.found_in(shapes)
            if width is None or width < least:
                raise ValueError(
                    f"{self.name} cannot be exported: a config that asks for {least} neurons in "
                    f"{part.block.path} gives it {width or 'another number'}."
                )
            widths.append(width)
            for name, along in part.weights.items():
                expected[name] = along.shape(self.base[name], width)
        if shapes != expected:
            odd = sorted(n for n in {*shapes, *expected} if shapes.get(n) != expected.get(n))
            raise ValueError(
                f"{self.name} cannot be exported: the fields of its config that say the width of "
                f"its FF blocks change {odd[0]}, too."
            )
        return widths

    def why_not(self, lacking: Sequence[int], *, several: bool) -> str:
        """Why the width of some blocks cannot be said, and whether it can of others, in words."""
        kind, path = type(self.model.config).__name__, self.parts[lacking[0]].block.path
        text = f"{self.name} cannot be exported: "
        others = [
            (len(odd), field, odd[0])
            for field, (numbers, odd) in self.others.items()
            if lacking[0] in numbers
        ]
        if not others:
            text += (
                f"no field of its config ({kind}) says how wide its FF blocks ({path}, ...) are."
            )
        else:
            _, field, odd = min(others, key=lambda other: other[0])
            text += (
                f"the field of its config that says how wide {path} is, {field}, changes {odd}, "
                "too, which stays as it is."
            )
        if several:
            layers = ", ".join(str(self.parts[number].block.layer) for number in lacking)
            text += f" The other blocks can be: keep all neurons of layers {layers}."
        return text


def _shapes_of(model: nn.Module) -> _Shapes:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def _differs(mine: object, other: object) -> str:
    if mine is None or other is None:
        return "is missing" if mine is None else "is not in these"
    return f"has shape {mine}, not {other}"


def _sounds_like_width(name: str) -> bool:
    return any(word in name for word in ("inner", "inter", "ff", "mlp", "hidden", "expan"))
