"""What an export has written, in numbers: how much smaller the new model is, and what it loses."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from flocking.models import html_table
from flocking.pruning.amounts import by_layer, in_words
from flocking.pruning.lost import Lost


@dataclass(frozen=True, repr=False)
class Exported:
    """A smaller model that was written, beside the one that it was made from.

    Attributes
    ----------
    path : Path
        The folder or file.
    parameters, parameters_before : int
        Weights of the smaller model and of the one that it was made from; shared ones count once.
    bytes, bytes_before : int
        Of the files' weights, and of those that they were made from.
    kept : dict of int
        How many neurons of each layer were kept; in a mixture, of all experts together. (Of a
        block that runs several times, its first layer counts.)
    stored : dict of int
        How many neurons each layer has in the files: `kept`, and those that fill it up.
    lost : Lost or None
        What the smaller model loses on other texts; None if that was not measured.
    only : str
        The class that alone reads the folder right, where ``AutoModelForCausalLM`` makes a model
        with other logits of it; else empty.
    zeros : int
        Neurons of zero weights in the files, all layers together: what they need where an
        architecture has one width for layers of different widths. They change no result.

    Examples
    --------
    >>> kept = flocking.select(flocking.weight_magnitude(model), density=[0.5, 0.25])
    >>> done = flocking.export(model, kept, "smaller", tokenizer=tokenizer)
    >>> done.kept, done.stored, done.zeros
    ({0: 32, 1: 16}, {0: 32, 1: 32}, 16)
    """

    path: Path
    parameters: int
    parameters_before: int
    bytes: int
    bytes_before: int
    kept: dict[int, int]
    stored: dict[int, int]
    lost: Lost | None = None
    only: str = ""
    zeros: int = field(init=False)

    def __post_init__(self) -> None:
        """Count what fills layers up."""
        zeros = sum(self.stored[layer] - kept for layer, kept in self.kept.items())
        object.__setattr__(self, "zeros", zeros)

    def rows(self) -> list[tuple[str, str]]:
        """A table for people: names, and what is to be read there."""
        found = [
            ("written to", str(self.path)),
            ("parameters", _of(f"{self.parameters:,}", f"{self.parameters_before:,}",
                               self.parameters / self.parameters_before)),
            ("size", _of(in_words(self.bytes), in_words(self.bytes_before),
                         self.bytes / self.bytes_before)),
            ("neurons kept", by_layer(self.kept)),
        ]  # fmt: skip
        if self.zeros:
            share = self.zeros / sum(self.stored.values())
            stored = f"{by_layer(self.stored)}: {self.zeros:,} are zeros ({share:.1%})"
            found.append(("neurons in the files", stored))
        if self.only:
            found.append(("loaded by", f"{self.only}, not by AutoModelForCausalLM"))
        if self.lost is not None:
            found += _lost_rows(self.lost)
        return found

    def __repr__(self) -> str:
        """The same table, as text."""
        return "\n".join(["Exported", *(f"  {name}: {text}" for name, text in self.rows())])

    def _repr_html_(self) -> str:
        return html_table(self.rows())


def _of(part: str, whole: str, share: float) -> str:
    return f"{part} of {whole} ({share:.1%})"


def _lost_rows(lost: Lost) -> list[tuple[str, str]]:
    times = f"{lost.pruned_perplexity / lost.perplexity:.3g} times"
    if not math.isnan(lost.ratio_low):
        times += f", 95% interval {lost.ratio_low:.3g} to {lost.ratio_high:.3g}"
    return [
        ("held-out texts", f"{lost.texts}, {lost.tokens:,} tokens"),
        ("perplexity", f"{lost.pruned_perplexity:.4g}, was {lost.perplexity:.4g} ({times})"),
        ("same likeliest token", f"{lost.agreement:.1%}"),
        ("divergence", f"{lost.divergence:.3g} nats a token"),
    ]
