"""Near-duplicates: texts that share most of their word pairs, by MinHash and its banding."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64, UInt16, UInt64
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from armo.data.check_texts import gram_hashes

GRAM = 2
"""Words in a shingle. With pairs, one changed word in twenty leaves a similarity of 0.8."""

BANDS = 20
BAND_ROWS = 6
"""Texts of similarity 0.8 meet in a band with probability 0.998, those of 0.5 with 0.27."""

MIN_WORDS = 6
"""Shorter texts are compared for equality alone: two of them are alike by chance."""

PAIRS_AT_ONCE = 100_000
GRAMS_AT_ONCE = 4096  # so that a text of megabytes needs no gigabytes

_SEED = 20240612


def _multipliers() -> tuple[UInt64[np.ndarray, "hashes 1"], UInt64[np.ndarray, "hashes 1"]]:
    rng = np.random.default_rng(_SEED)
    drawn = rng.integers(0, 2**64, (2, BANDS * BAND_ROWS, 1), dtype=np.uint64)
    return drawn[0] | np.uint64(1), drawn[1]


_FACTORS, _OFFSETS = _multipliers()


def minhash(words: UInt64[np.ndarray, " words"]) -> UInt16[np.ndarray, " hashes"]:
    """Sign a text: the share of equal entries of two signatures estimates how alike they are.

    That is the Jaccard similarity of their sets of word pairs, `|A & B| / |A | B|`, with a standard
    error of at most 0.046. Of each minimum the lowest 16 bits are kept.

    Args:
        words: Hashes of the words, in order; at least one.

    References:
        Broder, "On the resemblance and containment of documents", SEQUENCES 1997; Li and König,
        "b-Bit Minwise Hashing", WWW 2010.
    """
    grams = gram_hashes(words, GRAM)
    least = np.full(BANDS * BAND_ROWS, 2**32 - 1, dtype=np.uint64)
    for start in range(0, len(grams), GRAMS_AT_ONCE):
        hashes = _FACTORS * grams[start : start + GRAMS_AT_ONCE] + _OFFSETS
        least = np.minimum(least, hashes.min(axis=1) >> np.uint64(32))
    signature: UInt16[np.ndarray, " hashes"] = (least & np.uint64(0xFFFF)).astype(np.uint16)
    return signature


def similarity(
    first: UInt16[np.ndarray, "*batch hashes"], second: UInt16[np.ndarray, "*batch hashes"]
) -> np.ndarray:
    """Estimate how alike texts are, from 0 to 1, by their signatures."""
    return np.asarray((first == second).mean(axis=-1))


@dataclass(frozen=True, eq=False, slots=True)
class NearPairs:
    """Pairs of texts that are nearly the same, by their numbers.

    Attributes:
        first: The one with the lower number.
        second: The other.
        similarity: Of the two, estimated.
    """

    first: Int64[np.ndarray, " pairs"]
    second: Int64[np.ndarray, " pairs"]
    similarity: np.ndarray

    def clusters(self, texts: int) -> Int64[np.ndarray, " texts"]:
        """Number the sets of texts that hang together; a text without a near one is alone."""
        ones = np.ones(len(self.first), dtype=np.int8)
        graph = coo_array((ones, (self.first, self.second)), shape=(texts, texts))
        _, labels = connected_components(graph, directed=False)
        return np.asarray(labels, dtype=np.int64)


def near_pairs(
    signatures: UInt16[np.ndarray, "texts hashes"],
    *,
    threshold: float,
    within: Int64[np.ndarray, " texts"] | None = None,
) -> NearPairs:
    """Find texts that are nearly the same.

    Texts that agree in a whole band of their signatures are compared with the first of them and
    with the one before: of many alike texts not every pair is found, but all hang together.

    Args:
        signatures: Of each text.
        threshold: The estimated similarity from which on two texts are nearly the same.
        within: Only texts of the same number are compared; all, if None.

    Raises:
        ValueError: If the threshold is not in (0, 1].
    """
    if not 0.0 < threshold <= 1.0:
        raise ValueError(f"`threshold` must be above 0 and at most 1, got {threshold}")
    rng = np.random.default_rng(_SEED + 1)
    found: list[Int64[np.ndarray, "pairs 2"]] = []
    for band in range(BANDS):
        part = signatures[:, band * BAND_ROWS : (band + 1) * BAND_ROWS].astype(np.uint64)
        factors = rng.integers(0, 2**64, BAND_ROWS, dtype=np.uint64) | np.uint64(1)
        keys = (part * factors).sum(axis=1, dtype=np.uint64)
        if within is not None:
            keys += within.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        order = keys.argsort(kind="stable").astype(np.int64)
        same = np.flatnonzero(keys[order][1:] == keys[order][:-1]) + 1
        if len(same) == 0:
            continue
        # Where the run of equal keys begins that each of them is in.
        starts = np.flatnonzero(np.r_[True, keys[order][1:] != keys[order][:-1]])
        start = starts[np.searchsorted(starts, same, side="right") - 1]
        pairs = np.concatenate(
            [np.stack([order[other], order[same]], axis=1) for other in (start, same - 1)]
        )
        found += [
            part[similarity(signatures[part[:, 0]], signatures[part[:, 1]]) >= threshold]
            for part in np.array_split(pairs, len(pairs) // PAIRS_AT_ONCE + 1)
        ]
    pairs = np.unique(np.concatenate([np.empty((0, 2), dtype=np.int64), *found]), axis=0)
    first, second = pairs.T
    return NearPairs(first, second, similarity(signatures[first], signatures[second]))
