"""What a smaller model loses on texts, against the model that it was made from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Lost:
    """What a smaller model loses on texts that it was not made from.

    Attributes
    ----------
    texts, tokens : int
        How many texts were read, and how many tokens in them were predicted.
    perplexity, pruned_perplexity : float
        Of the model and of the smaller one, over all tokens.
    ratio_low, ratio_high : float
        95% interval of ``pruned_perplexity / perplexity``, from texts drawn anew; NaN with fewer
        than three texts.
    agreement : float
        Share of tokens where both models find the same next token the likeliest.
    divergence : float
        Mean Kullback-Leibler divergence of the smaller model's next-token distribution from the
        model's, in nats a token.
    """

    texts: int
    tokens: int
    perplexity: float
    pruned_perplexity: float
    ratio_low: float
    ratio_high: float
    agreement: float
    divergence: float
