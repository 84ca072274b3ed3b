"""A simple probe of preferences: pairs that say the opposite of what all the others teach."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.sparse import csr_matrix, hstack, vstack
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold

from armo.data.surface import SURFACE_FEATURES, surface_features

MIN_PAIRS = 200
"""A probe of fewer pairs knows too little to doubt one of them."""

SURE = 0.9
"""Pairs are only doubted if the probe is right on this share of those that it is as sure of."""

CHARACTERS = 4000
"""The probe reads so much of a response."""

FOLDS = 5


class ProbePair(NamedTuple):
    """A pair as the probe needs it: its row, what tells its prompt, and the two responses."""

    row: int
    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True, eq=False, slots=True)
class ProbedPairs:
    """What a probe says of pairs that it has not seen.

    Attributes:
        margin: The probe's log odds that `chosen` is the better one, of each pair.
    """

    margin: Float[np.ndarray, " pairs"]

    @property
    def sure(self) -> float:
        """The margin, of either sign, from which on the probe is sure: half of them have it."""
        return float(np.median(np.abs(self.margin)))

    @property
    def accuracy(self) -> float:
        """The share of pairs of which the probe prefers `chosen`."""
        return float((self.margin > 0.0).mean())

    @property
    def sure_accuracy(self) -> float:
        """The same where the probe is sure."""
        return float((self.margin[np.abs(self.margin) >= self.sure] > 0.0).mean())

    def suspects(self) -> list[int]:
        """Return the pairs that contradict the probe where it is sure, the worst first.

        None where it is wrong too often, sure as it is: that says more of the probe than of them.
        """
        if self.sure_accuracy < SURE or self.sure == 0.0:
            return []
        order = self.margin.argsort(kind="stable")
        return [int(k) for k in order if self.margin[k] <= -self.sure]


def probe_pairs(pairs: Sequence[ProbePair], *, seed: int = 0) -> ProbedPairs:
    """Predict each preference from those on other prompts, by words, length and format.

    A logistic regression on the difference of the two responses' features, without intercept:
    TF-IDF of hashed words and word pairs, and standardised surface features. Each pair is predicted
    by a fit to the other folds of five; a prompt's pairs are in one fold.

    Args:
        pairs: None of them a tie.
        seed: Of the folds, and of the pairs that are turned round so that both sides win.

    Raises:
        ValueError: If there are fewer prompts than folds.
    """
    differences = _differences(pairs)
    rng = np.random.default_rng(seed)
    sides = rng.permutation(np.arange(len(pairs)) % 2) * 2 - 1
    flipped = differences.multiply(sides[:, None]).tocsr()
    groups = [pair.prompt for pair in pairs]
    margin = np.empty(len(pairs))
    for fit, held in GroupKFold(FOLDS, shuffle=True, random_state=seed).split(sides, groups=groups):
        model = LogisticRegression(fit_intercept=False, C=1.0, max_iter=1000)
        model.fit(flipped[fit], sides[fit])
        margin[held] = model.decision_function(differences[held])
    return ProbedPairs(margin)


def _differences(pairs: Sequence[ProbePair]) -> csr_matrix:
    """Return the features of `chosen` less those of `rejected`."""
    words = HashingVectorizer(n_features=2**16, ngram_range=(1, 2), norm=None, alternate_sign=False)
    both = [
        words.transform([getattr(pair, side) for pair in pairs]) for side in ("chosen", "rejected")
    ]
    weighted = TfidfTransformer(sublinear_tf=True).fit(vstack(both))
    chosen, rejected = (weighted.transform(each) for each in both)
    style = [
        surface_features([getattr(pair, side) for pair in pairs]).numpy()
        for side in ("chosen", "rejected")
    ]
    apart = np.log1p(style[0]) - np.log1p(style[1])
    scale = np.sqrt((apart**2).mean(axis=0))
    apart = apart / np.where(scale > 0.0, scale, 1.0)
    assert apart.shape[1] == len(SURFACE_FEATURES)
    return csr_matrix(hstack([chosen - rejected, csr_matrix(apart)]))
