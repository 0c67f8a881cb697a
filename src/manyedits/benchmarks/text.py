"""Figures of generated text that need no model: entropy of n-grams, repetition, answers found in it."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

#: Weights of bigram and trigram entropy, as in the evaluation of ROME (arXiv:2202.05262, section 3.4, from its release).
ENTROPY_WEIGHTS = {2: 2 / 3, 3: 4 / 3}


def ngram_entropy(text: str) -> float | None:
    """Weighted mean of the entropies of bigrams and trigrams of words, in bits; None for a text without trigrams.

    Low values mean repetition. Words are those of NLTK's Treebank tokeniser, without splitting sentences first.
    """
    from nltk.tokenize import word_tokenize

    words = word_tokenize(text, preserve_line=True)
    if len(words) < max(ENTROPY_WEIGHTS):
        return None
    parts = [weight * _entropy(_grams(words, n)) for n, weight in ENTROPY_WEIGHTS.items()]
    return sum(parts) / len(parts)


def _grams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _entropy(counts: Counter[tuple[str, ...]]) -> float:
    total = counts.total()
    return -sum(c / total * math.log2(c / total) for c in counts.values())


def repetition(tokens: Sequence[int], n: int = 4) -> float | None:
    """Share of n-grams of tokens that occurred before in the same text; None for a text shorter than n + 1."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if len(grams) > 1 else None


def plain(text: str) -> str:
    """Text for comparing answers: composed, lower case, without punctuation at its ends and with single spaces."""
    joined = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return re.sub(r"^\W+|\W+$", "", joined)


def exact(said: str, wanted: str) -> bool:
    """Whether what was said begins with the wanted answer and that ends there at a word's end."""
    said, wanted = plain(said), plain(wanted)
    return bool(wanted) and re.match(re.escape(wanted) + r"(?!\w)", said) is not None


def contained(said: str, wanted: str) -> bool:
    """Whether the wanted answer stands anywhere in what was said, as whole words."""
    said, wanted = plain(said), plain(wanted)
    return bool(wanted) and re.search(r"(?<!\w)" + re.escape(wanted) + r"(?!\w)", said) is not None
