"""What a twin says of itself: what it holds, and what its last prompt cost."""

from __future__ import annotations

from dataclasses import dataclass

from flocking.models import html_table, text_table
from flocking.pruning.amounts import by_layer, in_words
from flocking.pruning.state import State

_TITLE = "Report of a twin: what it holds, and what its last prompt cost"


@dataclass(frozen=True, repr=False)
class Report:
    """What a twin holds, and what its last prompt cost.

    Attributes
    ----------
    parameters, active_parameters : int
        Parameters of the original, and those that decoding uses for one sequence.
    ff_bytes, compact_bytes : int
        Of the original's FF projections and of the compact ones. Both are in memory: a twin
        needs more of it, not less, while its original stays loaded.
    prefilled_tokens : int
        Real tokens that the selection was made from, all sequences together.
    unreached_experts : int
        Of mixtures of experts, how many no token of the prompt was routed to, layers and (with
        ``scope="sequence"``) sequences added up: their neurons are selected by their weights.
    refreshes : int
        Since the last prompt, how often the full model read again what was generated.
    effective_density : float
        FF weights that were read for a new token, over those that the full model reads, on
        average: the twin's steps and the passes of refreshes over the number of both. (Without
        refreshes, the density.)
    bytes_per_token : int
        Of all weights that were read for a new token, at most: of mixtures as if a token went to
        all experts, of embeddings as if all rows were looked up. What a refresh copies is not in
        it.
    drafted_tokens, accepted_tokens : int
        As ``assistant_model``: how many tokens the twin proposed since the last prompt, and how
        many of those the full model took. The last proposal is in neither: what became of it is
        not known before the next.
    selection_seconds, copy_seconds : float
        For the last selection, and for copying the kept neurons' weights; on several devices, the
        time of the first block's.
    """

    parameters: int
    active_parameters: int
    ff_bytes: int
    compact_bytes: int
    prefilled_tokens: int
    unreached_experts: int
    refreshes: int
    effective_density: float
    bytes_per_token: int
    drafted_tokens: int
    accepted_tokens: int
    selection_seconds: float
    copy_seconds: float

    def rows(self) -> list[tuple[str, str]]:
        """A table for people: names, and what is to be read there."""
        active = self.active_parameters / self.parameters
        found = [
            ("parameters", f"{self.parameters:,}"),
            ("active parameters", f"{self.active_parameters:,} ({active:.1%})"),
            ("FF projections", in_words(self.ff_bytes)),
            ("compact projections", f"{in_words(self.compact_bytes)}, beside the former"),
            ("tokens selected from", f"{self.prefilled_tokens:,}"),
            ("effective density", f"{self.effective_density:.3g}"),
            ("weights read for a token", "at most " + in_words(self.bytes_per_token)),
        ]
        if self.refreshes:
            found.append(("refreshes", f"{self.refreshes:,}"))
        if self.unreached_experts:
            found.append(("experts not reached", f"{self.unreached_experts:,}"))
        if self.drafted_tokens:
            taken = f"{self.accepted_tokens:,} of {self.drafted_tokens:,}"
            found.append(("drafted tokens accepted", taken))
        return [
            *found,
            ("selecting neurons", _time(self.selection_seconds)),
            ("copying their weights", _time(self.copy_seconds)),
        ]

    def __repr__(self) -> str:
        """The same table, as text."""
        return f"{_TITLE}\n{text_table([(f'  {name}', text) for name, text in self.rows()])}"

    def _repr_html_(self) -> str:
        return html_table(self.rows(), _TITLE)


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 0.9995 else f"{1000 * seconds:.3g} ms"


def held(state: State) -> str:
    """What a twin keeps at the moment, in words."""
    read = state.read
    if read is None:
        return "nothing: generate will read a prompt and select"
    kept = {layer: c.kept.shape[-1] for c in state.compacts for layer in c.layers}
    d_ff = sorted({c.block.d_ff for c in state.compacts})
    of = f"{d_ff[0]:,}" if len(d_ff) == 1 else f"{d_ff[0]:,} to {d_ff[-1]:,}"
    texts, tokens = len(read.tokens) // state.copies, int(read.tokens.sum()) // state.copies
    if texts == 1:
        told = ""
    elif state.selector.scope == "sequence":
        told = f", of each of {texts} texts its own"
    else:
        told = f", one selection for {texts} texts"
    return f"{by_layer(kept)}, of {of} neurons, selected from {tokens:,} tokens{told}"
