import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planted_rows import clean_rows

from armo.data.check_probe import ProbedPairs, ProbePair, probe_pairs


def test_pairs_are_doubted_where_the_probe_is_sure_and_mostly_right():
    margin = np.array([0.1, -0.2, 0.3, -0.4, *np.linspace(1.0, 3.0, 20), -2.0, -1.5])
    probed = ProbedPairs(margin)
    assert probed.accuracy == pytest.approx(22 / 26)
    assert 1.0 < probed.sure < 2.0
    confident = margin[np.abs(margin) >= np.median(np.abs(margin))]
    assert probed.sure_accuracy == (confident > 0).mean()
    more = ProbedPairs(np.array([*margin, *[1.8] * 20]))
    assert more.sure == 1.8
    assert more.suspects() == [24]


def test_a_probe_that_is_often_wrong_where_it_is_sure_doubts_no_pair():
    margin = np.random.default_rng(0).normal(0.5, 1.0, 1000)
    probed = ProbedPairs(margin)
    assert probed.sure_accuracy < 0.9
    assert probed.suspects() == []


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=40))
def test_suspects_are_the_pairs_below_the_sure_margin_worst_first(margins):
    probed = ProbedPairs(np.array(margins))
    doubted = probed.margin[probed.suspects()]
    assert (np.diff(doubted) >= 0).all()
    if len(doubted):
        assert (doubted < 0).all()
        assert len(doubted) == (probed.margin <= -probed.sure).sum()
        assert len(doubted) <= 0.1 * (np.abs(probed.margin) >= probed.sure).sum()


def test_constant_margins_doubt_nothing():
    assert ProbedPairs(np.zeros(300)).suspects() == []


def pair(number, chosen, rejected):
    return ProbePair(number, f"Why {number}?", chosen, rejected)


def test_a_pair_is_judged_by_the_pairs_of_other_prompts():
    rows = clean_rows()["pairs"]
    pairs = [pair(k, row["chosen"], row["rejected"]) for k, row in enumerate(rows)]
    probed = probe_pairs(pairs)
    assert probed.accuracy > 0.95
    # A pair's own label says nothing about its margin but the sign.
    turned = [pair(0, rows[0]["rejected"], rows[0]["chosen"]), *pairs[1:]]
    assert probe_pairs(turned).margin[0] == pytest.approx(-probed.margin[0], rel=0.2)


def test_a_probe_of_noise_knows_nothing():
    rng = np.random.default_rng(0)
    rows = clean_rows()["ratings"]
    texts = [row["messages"][1]["content"] for row in rows]
    pairs = [pair(k, *rng.choice(texts, 2, replace=False)) for k in range(300)]
    probed = probe_pairs(pairs)
    assert 0.35 < probed.accuracy < 0.65
    assert probed.suspects() == []


def test_the_same_seed_gives_the_same_result():
    rows = clean_rows()["pairs"]
    pairs = [pair(k, row["chosen"], row["rejected"]) for k, row in enumerate(rows)]
    np.testing.assert_array_equal(probe_pairs(pairs).margin, probe_pairs(pairs).margin)
