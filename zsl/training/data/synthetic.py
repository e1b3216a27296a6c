"""Generate rows of a synthetic language, which need neither a file nor a tokenizer."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

SYNTHETIC_SAMPLES = 20
# Number of words, and the probabilities of each word's successors.
SYNTHETIC_WORDS = 32
SUCCESSOR_CHANCES = (0.85, 0.10, 0.05)


def synthetic_language(length: int, vocabulary: int, seed: int) -> Callable[[int], list[list[int]]]:
    """Return a generator of sentences: a Markov chain over a few token ids of the vocabulary, made with `seed`.

    It is called with a number of sentences, of `length` tokens each, and returns new ones at each call. A model that
    learns the chain lowers its loss from ln(vocabulary) to the chain's entropy of about half a nat.
    """
    random = np.random.default_rng(seed)
    words = random.choice(vocabulary, size=min(SYNTHETIC_WORDS, vocabulary), replace=False)
    next_words = np.stack([random.choice(len(words), len(SUCCESSOR_CHANCES), replace=False) for _ in words])

    def write(sentences: int) -> list[list[int]]:
        rows = np.empty((sentences, length), dtype=np.int64)
        state = random.integers(len(words), size=sentences)
        for position in range(length):
            rows[:, position] = words[state]
            branch = random.choice(len(SUCCESSOR_CHANCES), size=sentences, p=SUCCESSOR_CHANCES)
            state = next_words[state, branch]
        return list(rows.tolist())

    return write
