import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from armo.data.surface import SURFACE_FEATURES, surface_features
from armo.report.baselines import RANDOM_DRAWS, baseline_scores

TEXTS = [
    "Short.",
    "A somewhat longer answer in plain words, with nothing marked in it at all.",
    "- **one** `x`\n- *two*\n\n# Three",
    "Is it? Sure! Is it! Sure?",
]


def test_baselines_score_length_and_marks_and_nothing_else():
    scores = baseline_scores(surface_features(TEXTS))
    assert list(scores) == ["random", "longer", "shorter", "more marks"]
    words = [1, 14, 4, 6]
    assert scores["longer"][0].tolist() == pytest.approx([math.log1p(n) for n in words])
    assert scores["shorter"].tolist() == (-scores["longer"]).tolist()
    # Two items, bold, code, italic and a heading; questions and exclamations are no marks.
    assert scores["more marks"].tolist() == [[0.0, 0.0, 6.0, 0.0]]


@given(st.integers(0, 99))
def test_random_scores_are_seeded_distinct_and_blind(seed):
    surface = torch.zeros(30, len(SURFACE_FEATURES))
    random = baseline_scores(surface, seed=seed)["random"]
    assert random.shape == (RANDOM_DRAWS, 30)
    assert len(random.unique()) == random.numel()
    assert torch.equal(random, baseline_scores(surface + 1.0, seed=seed)["random"])
    assert not torch.equal(random, baseline_scores(surface, seed=seed + 1)["random"])
