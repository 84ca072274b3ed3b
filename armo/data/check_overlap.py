"""Contamination: texts of benchmarks that stand in the data, found by the word runs they share."""

from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Int64, UInt64

from armo.data.check_texts import gram_hashes, word_hashes
from armo.data.conversation import ResponseList

GRAM = 8
"""Words in a run. Runs that several texts of the benchmarks have are wording, and not counted."""

SHARE = 0.5
"""A benchmark's text is in a text that has this share of its runs."""

MIN_WORDS = 4
"""Shorter texts of a benchmark (`Thank you.`) are not looked for."""


class BenchmarkGrams:
    """Runs of words of the prompts and the right responses of benchmarks.

    A prompt of fewer words than a run is found where it is the whole text; such responses are not
    looked for.

    Attributes:
        items: Name of the benchmark and what text it is, of each text.
    """

    def __init__(self, benchmarks: Iterable[tuple[str, Iterable[ResponseList]]]) -> None:
        """Read the rows of benchmarks, given with their names."""
        self.items: list[tuple[str, str]] = []
        grams: list[UInt64[np.ndarray, " grams"]] = []
        seen: set[bytes] = set()
        for name, rows in benchmarks:
            for row in rows:
                for what, text, least in _texts(row):
                    words = word_hashes(text)
                    if len(words) < least or words.tobytes() in seen:
                        continue
                    seen.add(words.tobytes())
                    self.items.append((name, f"{what} of {row.place or repr(row.id)}"))
                    grams.append(gram_hashes(words, GRAM))
        owners = [np.full(len(each), k) for k, each in enumerate(grams)]
        flat = np.concatenate([np.empty(0, dtype=np.uint64), *grams])
        owner = np.concatenate([np.empty(0, dtype=np.int64), *owners])
        order = flat.argsort(kind="stable")
        self._grams: UInt64[np.ndarray, " grams"] = flat[order]
        self._owner: Int64[np.ndarray, " grams"] = owner[order]
        self._sizes = self._own_grams()

    def _own_grams(self) -> Int64[np.ndarray, " items"]:
        """Drop runs that several texts have, unless a text would have none left; count the rest."""
        items = len(self.items)
        _, number, times = np.unique(self._grams, return_inverse=True, return_counts=True)
        shared = times[number] > 1
        own = np.bincount(self._owner[~shared], minlength=items)
        kept = ~shared | (own[self._owner] == 0)
        self._grams, self._owner = self._grams[kept], self._owner[kept]
        return np.bincount(self._owner, minlength=items)

    def find(self, text: str) -> Iterator[tuple[str, str]]:
        """Yield benchmark and text of each that stands in `text`, in whole or by half."""
        words = word_hashes(text)
        found, counts = np.unique(self._owners(gram_hashes(words, GRAM)), return_counts=True)
        for item, count in zip(found.tolist(), counts.tolist(), strict=True):
            if count >= SHARE * self._sizes[item]:
                yield self.items[item]

    def _owners(self, grams: UInt64[np.ndarray, " grams"]) -> Int64[np.ndarray, " hits"]:
        first = np.searchsorted(self._grams, grams, side="left")
        last = np.searchsorted(self._grams, grams, side="right")
        known = first < last
        hits = [self._owner[a:b] for a, b in zip(first[known], last[known], strict=True)]
        return np.concatenate([np.empty(0, dtype=np.int64), *hits])


def _texts(row: ResponseList) -> Iterator[tuple[str, str, int]]:
    """Yield what is looked for, and the words that it needs."""
    prompt = next(turn.content for turn in reversed(row.prompt) if turn.role == "user")
    yield "the prompt", prompt, MIN_WORDS
    right = min(row.ranking)
    for k, (text, rank) in enumerate(zip(row.responses, row.ranking, strict=True)):
        if rank == right:
            yield f"`responses[{k}]`", text, GRAM
