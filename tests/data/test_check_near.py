import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from armo.data.check_near import (
    BAND_ROWS,
    BANDS,
    GRAM,
    GRAMS_AT_ONCE,
    NearPairs,
    minhash,
    near_pairs,
    similarity,
)
from armo.data.check_texts import gram_hashes, word_hashes


def sign(text):
    return minhash(word_hashes(text))


def jaccard(first, second):
    """The similarity of two texts, from the sets themselves."""
    sets = [set(gram_hashes(word_hashes(text), GRAM).tolist()) for text in (first, second)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def edited(words, changes, rng):
    words = list(words)
    for _ in range(changes):
        words[rng.randrange(len(words))] = f"new{rng.randrange(10**6)}"
    return " ".join(words)


def test_signatures_estimate_the_jaccard_similarity_without_bias():
    rng = random.Random(0)
    errors = []
    for _ in range(300):
        words = [f"w{rng.randrange(10**6)}" for _ in range(rng.randrange(20, 200))]
        texts = " ".join(words), edited(words, rng.randrange(0, 40), rng)
        errors.append(similarity(sign(texts[0]), sign(texts[1])) - jaccard(*texts))
    # One estimate has a standard error of 0.5 / sqrt(120) at most.
    assert abs(np.mean(errors)) < 4 * 0.046 / np.sqrt(300)
    assert np.std(errors) < 0.046


@given(st.lists(st.text("abc", min_size=1), min_size=1, max_size=20))
def test_texts_of_the_same_words_have_the_same_signature(words):
    first, second = " ".join(words), ", ".join(words).upper() + "!"
    assert similarity(sign(first), sign(second)) == 1.0


def test_a_text_of_any_length_is_signed_in_parts():
    words = [f"w{k}" for k in range(3 * GRAMS_AT_ONCE)]
    whole = sign(" ".join(words))
    hashes = word_hashes(" ".join(words))
    parts = [hashes[a : a + 1000] for a in range(0, len(hashes), 999)]
    # The lowest hash of all is that of one of the parts.
    assert np.stack([minhash(part) == whole for part in parts]).any(axis=0).all()


def brute_force(signatures, threshold):
    pairs = [(a, b) for b in range(len(signatures)) for a in range(b)]
    return {(a, b) for a, b in pairs if similarity(signatures[a], signatures[b]) >= threshold}


@pytest.fixture(scope="module")
def families():
    """100 texts in families of 1 to 5, whose members differ in a few words."""
    rng = random.Random(1)
    texts = []
    while len(texts) < 100:
        words = [f"w{rng.randrange(10**6)}" for _ in range(60)]
        for _ in range(rng.randrange(1, 6)):
            texts.append(edited(words, rng.randrange(3), rng))
    return np.stack([sign(text) for text in texts])


def test_near_pairs_hang_together_as_comparing_all_with_all_says(families):
    threshold = 0.8
    found = near_pairs(families, threshold=threshold)
    everything = brute_force(families, threshold)
    pairs = set(zip(found.first.tolist(), found.second.tolist(), strict=True))
    assert len(everything) > 50
    assert pairs <= everything
    nothing = np.empty(0)
    first, second = (np.array(side) for side in zip(*everything, strict=True))
    reference = NearPairs(first, second, nothing).clusters(len(families))
    clusters = found.clusters(len(families))
    same = clusters[:, None] == clusters
    assert (same == (reference[:, None] == reference)).all()
    np.testing.assert_array_equal(
        found.similarity, similarity(families[found.first], families[found.second])
    )


def test_only_texts_of_the_same_number_are_compared(families):
    within = np.arange(len(families)) % 2
    found = near_pairs(families, threshold=0.8, within=within)
    assert len(found.first) > 0
    assert (within[found.first] == within[found.second]).all()
    alone = near_pairs(families[::2], threshold=0.8)
    even = within[found.first] == 0
    assert (found.first[even] // 2).tolist() == alone.first.tolist()


@pytest.mark.parametrize("order", [[0, 1, 2], [1, 0, 2], [0, 2, 1]])
def test_a_text_between_two_alike_ones_does_not_hide_them(order):
    """All three agree in one band; two of them in five of six entries of all the others."""
    rng = np.random.default_rng(0)
    signature, other = rng.integers(0, 2**16, (2, BANDS * BAND_ROWS), dtype=np.uint16)
    alike = signature.copy()
    alike[::BAND_ROWS] += 1
    for each in (other, alike):
        each[:BAND_ROWS] = signature[:BAND_ROWS]
    found = near_pairs(np.stack([signature, other, alike])[order], threshold=0.8)
    expected = sorted([order.index(0), order.index(2)])
    assert [*zip(found.first.tolist(), found.second.tolist(), strict=True)] == [tuple(expected)]


def test_texts_that_have_little_in_common_are_no_pair():
    rng = random.Random(2)
    texts = [" ".join(f"w{rng.randrange(10**6)}" for _ in range(30)) for _ in range(200)]
    found = near_pairs(np.stack([sign(text) for text in texts]), threshold=0.5)
    assert len(found.first) == 0
    assert found.clusters(200).tolist() == [*range(200)]


def test_few_texts_are_none_or_one_pair():
    none = np.empty((0, BANDS * BAND_ROWS), dtype=np.uint16)
    assert len(near_pairs(none, threshold=0.8).first) == 0
    two = np.stack([sign("one two three")] * 2)
    assert near_pairs(two, threshold=1.0).similarity.tolist() == [1.0]


@pytest.mark.parametrize("threshold", [0.0, 1.5, float("nan")])
def test_a_threshold_that_is_no_similarity_is_an_error(threshold):
    none = np.empty((0, BANDS * BAND_ROWS), dtype=np.uint16)
    with pytest.raises(ValueError, match="`threshold` must be above 0 and at most 1"):
        near_pairs(none, threshold=threshold)
