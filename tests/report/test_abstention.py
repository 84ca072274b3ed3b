import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from armo.report.abstention import COVERAGES, abstention_tables, risk_coverage


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def slow_curve(differences):
    """Accuracy at each coverage and the area, pair by pair."""

    def accuracy(least):
        kept = [d for d in differences if abs(d) >= least]
        return sum(1.0 if d > 0 else 0.5 if d == 0 else 0.0 for d in kept) / len(kept)

    sizes = sorted((abs(d) for d in differences), reverse=True)
    at = [accuracy(sizes[-(-len(sizes) * percent // 100) - 1]) for percent in COVERAGES]
    return [*at, sum(accuracy(size) for size in sizes) / len(sizes)]


def slow_risk_coverage(differences, prompts, *, seed, draws):
    names = sorted(set(prompts.tolist()))
    of = [[float(d) for d, p in zip(differences, prompts, strict=True) if p == n] for n in names]
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for _ in range(draws):
        picked = torch.randint(len(names), (len(names),), generator=generator).tolist()
        drawn.append(slow_curve([d for k in picked for d in of[k]]))
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    return slow_curve(differences.tolist()), low, high


@settings(max_examples=20)
@given(
    seed=st.integers(0, 99),
    pairs=st.integers(1, 30),
    prompts=st.integers(1, 12),
    decimals=st.sampled_from([0, 1, 9]),
)
def test_the_curve_is_that_of_a_slow_loop_over_resampled_prompts(seed, pairs, prompts, decimals):
    differences = (0.5 + draw(pairs, seed=seed)).round(decimals=decimals)  # ties among them
    generator = torch.Generator().manual_seed(seed)
    groups = 3 * torch.randint(prompts, (pairs,), generator=generator)
    found, area = risk_coverage(differences, groups, seed=seed, draws=60)
    means, low, high = slow_risk_coverage(differences, groups, seed=seed, draws=60)
    assert [each.mean for each in (*found, area)] == pytest.approx(means)
    assert [each.low for each in (*found, area)] == pytest.approx(low)
    assert [each.high for each in (*found, area)] == pytest.approx(high)


def test_a_model_that_knows_what_it_knows_is_right_on_what_it_answers():
    differences = torch.tensor([-0.1, 0.2, -0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    found, area = risk_coverage(differences, torch.arange(10))
    at = {percent: each.mean for percent, each in zip(COVERAGES, found, strict=True)}
    assert [at[k] for k in (100, 90, 80, 70, 10)] == pytest.approx([0.8, 8 / 9, 7 / 8, 1.0, 1.0])
    assert area.mean == pytest.approx((7 + 7 / 8 + 8 / 9 + 8 / 10) / 10)
    worst, _ = risk_coverage(-differences.flip(0), torch.arange(10))
    assert worst[0].mean == pytest.approx(0.2)
    assert worst[-1].mean == 0.0


@given(st.lists(st.integers(-9, 9), min_size=1, max_size=20), st.floats(0.1, 9.0))
def test_only_the_order_of_the_differences_counts(values, scale):
    differences = torch.tensor(values, dtype=torch.float64)
    prompts = torch.arange(len(values))
    plain = risk_coverage(differences, prompts, draws=30)
    assert risk_coverage(scale * differences**3, prompts, draws=30) == plain


def test_pairs_that_are_equally_clear_are_answered_together():
    differences = torch.tensor([1.0, -1.0, 1.0, 1.0])
    found, area = risk_coverage(differences, torch.arange(4))
    assert [each.mean for each in found] == [0.75] * 10
    assert area.mean == 0.75
    assert area.low < 0.5 < area.high


def test_where_clearness_says_nothing_the_area_is_the_accuracy():
    right = torch.rand(4000, generator=torch.Generator().manual_seed(1)) < 0.7
    differences = draw(4000).abs() * (2.0 * right - 1.0)
    [_, summary] = abstention_tables(["a"], differences[None], torch.arange(4000))
    [(_, area, low, high, random)] = summary.rows
    assert random == pytest.approx(float(right.double().mean()))
    assert area == pytest.approx(random, abs=0.02)
    assert low < random < high


def test_intervals_hold_the_accuracy_of_the_population_about_as_often_as_they_say():
    covered = np.zeros(2)
    for seed in range(150):
        # Right with probability sigmoid(2 |d|): the clearest half of |d| is above its median.
        clear = draw(120, seed=seed).abs()
        chance = torch.rand(120, generator=torch.Generator().manual_seed(1000 + seed))
        differences = torch.where(chance.double() < torch.sigmoid(2.0 * clear), clear, -clear)
        found, area = risk_coverage(differences, torch.arange(120), seed=seed, draws=200)
        at_half = found[COVERAGES.index(50)]
        covered += [at_half.low <= HALF <= at_half.high, area.low <= AREA <= area.high]
    assert (covered / 150 > 0.88).all()
    assert (covered / 150 < 1.0).all()


def population():
    """Accuracy of the clearest half and area, for the draws of the test above, by quadrature."""
    x = np.linspace(0.0, 8.0, 200_001)
    density = np.sqrt(2.0 / math.pi) * np.exp(-x * x / 2.0) * (x[1] - x[0])
    kept = density[::-1].cumsum()
    right = (density / (1.0 + np.exp(-2.0 * x)))[::-1].cumsum()
    half = np.searchsorted(kept, 0.5)
    return right[half] / kept[half], float((density[::-1] * right / kept).sum())


HALF, AREA = population()


def test_tables_have_a_row_per_model_and_coverage():
    differences = torch.stack([draw(50, seed=1) + 0.5, draw(50, seed=2) + 0.5])
    prompts = torch.arange(50) // 2
    curve, summary = abstention_tables(["a", "b"], differences, prompts, seed=4)
    assert (curve.name, summary.name) == ("abstention", "abstention_summary")
    assert curve.column("model") == ["a"] * 10 + ["b"] * 10
    assert curve.column("coverage") == [*COVERAGES] * 2
    assert "50 pairs on 25 prompts" in curve.note
    for k, name in enumerate("ab"):
        found, area = risk_coverage(differences[k], prompts, seed=4)
        rows = [row[2:] for row in curve.rows if row[0] == name]
        assert rows == [(each.mean, each.low, each.high) for each in found]
        [row] = [row[1:] for row in summary.rows if row[0] == name]
        assert row == (area.mean, area.low, area.high, found[0].mean)


@pytest.mark.parametrize("values", [[], [1.0, math.nan]])
def test_pairs_and_numbers_are_needed(values):
    with pytest.raises(ValueError, match="`differences` needs at least one pair, and numbers"):
        risk_coverage(torch.tensor(values), torch.arange(len(values)))
